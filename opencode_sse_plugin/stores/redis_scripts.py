"""The scripts that are everything done with a log in Redis: each one atomic. ``redis_log.py`` says what they work on,
``redis.py`` what they promise."""

from __future__ import annotations

from hashlib import sha1
from typing import Final, NamedTuple

from . import KNOWN_MAX

#: The chain keeps so many epochs; a cursor of one before them is of a history that is not known any more.
EPOCHS_MAX: Final = 100
#: Pruning deletes at most so much in one step, or where more was appended, twice that.
PRUNE_EVENTS: Final = 500
_PRUNE_BYTES: Final = 4 * 1024 * 1024
#: Appending prunes at one part in so many above what is kept.
_SLACK: Final = 64
#: For how long at least the answer to a writer's newest batch is remembered, in milliseconds.
_REMEMBER: Final = 600_000

_COMMON: Final = f"""
local stream, meta, known = KEYS[1], KEYS[2], KEYS[3]
local log, info

local function int(number)
  return string.format('%.0f', number)
end

-- Payload bytes: a body may begin with a line that says where the event belongs.
local function size_of(body)
  return string.byte(body) == 91 and #body - string.find(body, '\\n', 1, true) or #body
end

-- Reads what is known of the log into `log`, and one field more; nil where there is none. An error is returned.
local function load(field)
  info = redis.call('INFO', 'replication')
  if not string.find(info, 'role:master', 1, true) then
    return redis.error_reply('READONLY it is a replica')
  end
  local got = redis.call('HMGET', meta, 'version', 'head', 'oldest', 'bytes', 'chain', 'replid', 'run', 'always',
    'replicated', 'newest', field or 'version')
  if not got[1] then
    if redis.call('EXISTS', meta, stream, known) > 0 then
      return redis.error_reply('FOREIGN')
    end
    return nil
  elseif got[1] ~= '1' then
    return redis.error_reply('NEWER ' .. got[1])
  end
  log = {{head = tonumber(got[2]), oldest = tonumber(got[3]), bytes = tonumber(got[4]), chain = got[5], replid = got[6],
    run = got[7], always = got[8], replicated = got[9], newest = got[10], field = got[11]}}
  -- Looked for from the end, where it is: else a long chain costs more than all the rest.
  log.epoch = string.match(log.chain, '^([^ ]+):%d+$') or string.match(log.chain, '^.* ([^ ]+):%d+$')
end

-- Whether an event still has the number under which somebody knows it; unknown counts as yes.
local function is_right(seq, name)
  if seq == '' then
    return true
  end
  seq = tonumber(seq)
  if seq < log.oldest or (seq <= log.head and seq <= log.head - {KNOWN_MAX}) then
    return true
  end
  return seq <= log.head and (seq == log.head and name == log.newest or redis.call('ZSCORE', known, name) == int(seq))
end

local function replicas()
  return string.find(info, 'connected_slaves:0\\r', 1, true) and '0' or '1'
end

-- Whether the log was stored under the replication id there is now.
local function is_same_replid()
  return log.replid and string.find(info, 'master_replid:' .. log.replid, 1, true)
end

-- Which process of the server this is. `vouched` names one, and says whether it flushes every write before it answers.
local function run_id()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
end

local function identify(run, vouched)
  local replid = string.match(info, 'master_replid:(%x+)')
  log.replid, log.run, log.always, log.replicated = replid, run, string.match(vouched, ':(%d)$'), replicas()
  redis.call('HSET', meta, 'replid', replid, 'run', run, 'always', log.always, 'replicated', log.replicated)
end

local function begin_epoch(epoch, began)
  local chain = log.chain .. ' ' .. epoch .. ':' .. int(began)
  local _, links = string.gsub(chain, ':', ':')
  while links > {EPOCHS_MAX} do
    chain, links = string.match(chain, '^[^ ]+ (.*)$'), links - 1
  end
  log.chain, log.epoch = chain, epoch
  redis.call('HSET', meta, 'chain', chain)
end

local function create(epoch, run, vouched)
  log = {{head = 0, oldest = 1, bytes = 0, chain = epoch .. ':0', epoch = epoch, newest = ''}}
  redis.call('HSET', meta, 'version', '1', 'head', '0', 'oldest', '1', 'bytes', '0', 'chain', log.chain, 'newest', '')
  identify(run, vouched)
end

-- What every answer begins with; the chain only for one who has another epoch.
local function extent(epoch)
  return {{log.epoch, log.epoch ~= epoch and log.chain or false, log.oldest, log.head, log.bytes}}
end

local function clock(given)
  if given ~= '' then
    return tonumber(given)
  end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Deletes at most so many events that are beyond what is kept; whether there were as many as that.
local function prune(keep_events, keep_bytes, before, most)
  local left, size, last, gone, done = log.head - log.oldest + 1, log.bytes, log.oldest - 1, 0, false
  while not done and gone < most and log.bytes - size < {_PRUNE_BYTES} do
    local entries = redis.call('XRANGE', stream, int(last + 1), '+', 'COUNT', math.min(20, most - gone))
    done = #entries == 0
    for _, entry in ipairs(entries) do
      local seq, at = string.match(entry[1], '^(%d+)-(%d+)$')
      local over = left > 1 and (left > keep_events or size > keep_bytes)
      if not (over or tonumber(at) < before) then
        done = true
        break
      end
      gone, last = gone + 1, tonumber(seq)
      left, size = log.head - last, size - size_of(entry[2][2])
    end
  end
  if gone > 0 then
    -- First what is allowed where memory is short.
    redis.call('XTRIM', stream, 'MINID', int(last + 1))
    redis.call('ZREMRANGEBYSCORE', known, '-inf', int(last))
    log.oldest, log.bytes = last + 1, size
    redis.call('HSET', meta, 'oldest', int(log.oldest), 'bytes', int(size))
  end
  return not done
end
"""

_OPEN: Final = f"""
local epoch, vouched = ARGV[1], ARGV[2]
local wrong = load()
if wrong then
  return wrong
end
if not log then
  local run = run_id()
  if string.match(vouched, '^%x*') ~= run then
    return {{'WHO'}}
  end
  create(epoch, run, vouched)
end
-- What was answered to writers that are gone is not asked for any more.
local now, fields = clock(''), redis.call('HGETALL', meta)
for i = 1, #fields, 2 do
  local at = string.match(fields[i], '^batch:') and string.match(fields[i + 1], '^%d+ (%d+)')
  if at and tonumber(at) < now - {_REMEMBER} then
    redis.call('HDEL', meta, fields[i])
  end
end
local answer = extent('')
answer[6] = log.head > 0 and log.newest or false
return answer
"""

# A new epoch, unless somebody was faster: everything beyond `good` may mean something else than it did.
_BEGIN: Final = """
local expected, epoch, vouched, good, cut = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local wrong = load()
if wrong then
  return wrong
end
local run = run_id()
if string.match(vouched, '^%x*') ~= run then
  return {'WHO'}
end
if not log then
  create(epoch, run, vouched)
elseif expected == '' or expected == log.epoch then
  good = good == '' and log.head or math.min(tonumber(good), log.head)
  if cut == '1' and good < log.head then
    -- Written anew: a stream takes no number again that it had, not even one that was deleted.
    local kept, size = redis.call('XRANGE', stream, '-', int(good)), 0
    redis.call('DEL', stream)
    for _, entry in ipairs(kept) do
      redis.call('XADD', stream, entry[1], entry[2][1], entry[2][2])
      size = size + size_of(entry[2][2])
    end
    redis.call('ZREMRANGEBYSCORE', known, int(good + 1), '+inf')
    local newest = kept[#kept] and kept[#kept][2][1] or ''
    log.head, log.bytes, log.oldest = good, size, math.min(log.oldest, good + 1)
    redis.call('HSET', meta, 'head', int(good), 'bytes', int(size), 'oldest', int(log.oldest), 'newest', newest)
  end
  begin_epoch(epoch, good)
  identify(run, vouched)
end
return extent('')
"""

_APPEND: Final = f"""
local mine, last_seq, last_name, vouched, epoch = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local number, now, more_bytes, after = tonumber(ARGV[6]), clock(ARGV[7]), tonumber(ARGV[8]), ARGV[9]
local writer, keep_events, keep_bytes, keep_age = ARGV[10], tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13]
local before, count = 13, (#ARGV - 13) / 2
local wrong = load(writer)
if wrong then
  return wrong
end
-- Asked again, since the answer did not arrive? Then it is this one.
if log and log.field then
  local of = tonumber(string.match(log.field, '^%d+'))
  if of == number then
    local answer = extent(mine)
    answer[6] = string.match(log.field, '^%d+ %d+ (.*)$')
    return answer
  elseif of > number then
    return {{'STALE'}}
  end
end
-- What was submitted before is stored before, and may come another way.
if after ~= '' then
  local other, least = string.match(after, '^(.*) (%d+)$')
  local stored = log and redis.call('HGET', meta, other)
  if not stored or tonumber(string.match(stored, '^%d+')) < tonumber(least) then
    return {{'EARLY'}}
  end
end
if not log or not is_same_replid() then
  -- The name of the epoch that may begin comes with the next call, for this once.
  local run = run_id()
  if epoch == '' or string.match(vouched, '^%x*') ~= run then
    return {{'WHO'}}
  end
  if not log then
    create(epoch, run, vouched)
  elseif log.epoch == mine and not is_right(last_seq, last_name) then
    return {{'LOST'}}
  else
    local promoted = not string.find(info, 'master_replid2:0000000000', 1, true)
    local restarted = run ~= log.run
    if promoted or (restarted and (log.always ~= '1' or log.replicated == '1')) then
      begin_epoch(epoch, log.head)
    end
    identify(run, vouched)
  end
elseif log.epoch == mine and not is_right(last_seq, last_name) then
  return {{'LOST'}}
end
if log.replicated == '0' and replicas() == '1' then
  redis.call('HSET', meta, 'replicated', '1')
end
if log.always == '1' and vouched ~= log.run .. ':1' then
  redis.call('HSET', meta, 'always', '0')
end

local head, at, olds = log.head, int(now), ''
local suffix = '-' .. at
-- Mostly all are new, and two to a thousand of them are told so by one command.
local fresh, added = {{}}, 0
for i = 1, count do
  fresh[2 * i - 1] = head + i
  fresh[2 * i] = ARGV[before + 2 * i - 1]
end
for from = 1, 2 * count, 2000 do
  added = added + redis.call('ZADD', known, 'NX', unpack(fresh, from, math.min(from + 1999, 2 * count)))
end
local bodies
if added < count then
  -- Else each is looked for: known is what is among the newest, or stands in the batch before.
  redis.call('ZREMRANGEBYSCORE', known, int(head + 1), '+inf')
  local names, places, seqs = fresh, {{}}, {{}}
  fresh, bodies, more_bytes = {{}}, {{}}, 0
  for i = 1, count do
    local name = names[2 * i]
    local seq = seqs[name]
    if not seq then
      seq = tonumber(redis.call('ZSCORE', known, name) or 0)
      if seq == 0 or seq <= log.head - {KNOWN_MAX} then
        head = head + 1
        seq = false
        seqs[name] = head
        bodies[#bodies + 1] = ARGV[before + 2 * i]
        more_bytes = more_bytes + size_of(bodies[#bodies])
        fresh[#fresh + 1] = head
        fresh[#fresh + 1] = name
      end
    end
    if seq then
      places[#places + 1] = (i - 1) .. ':' .. int(seq)
    end
  end
  for from = 1, #fresh, 2000 do
    redis.call('ZADD', known, unpack(fresh, from, math.min(from + 1999, #fresh)))
  end
  olds = table.concat(places, ' ')
else
  head = head + count
end
for i = 1, #fresh / 2 do
  local body = bodies and bodies[i] or ARGV[before + 2 * i]
  local stored = redis.pcall('XADD', stream, (log.head + i) .. suffix, fresh[2 * i], body)
  if type(stored) == 'table' and stored.err then
    -- It can only be the first: what that one is given, the others are.
    redis.call('ZREMRANGEBYSCORE', known, int(log.head + 1), '+inf')
    return redis.error_reply(string.find(stored.err, 'equal or smaller', 1, true) and 'FOREIGN' or stored.err)
  end
end
local text = int(log.head + 1) .. ' ' .. olds
local bytes = log.bytes + more_bytes
redis.call('HSET', meta, 'head', int(head), 'bytes', int(bytes), 'newest', fresh[#fresh] or log.newest, writer,
  number .. ' ' .. at .. ' ' .. text)
-- Now and then what is not among the newest any more is forgotten.
if head - {KNOWN_MAX} >= log.oldest and math.floor(head / 256) > math.floor(log.head / 256) then
  redis.call('ZREMRANGEBYSCORE', known, '-inf', int(head - {KNOWN_MAX}))
end
log.head, log.bytes = head, bytes
local held = head - log.oldest + 1
if held > keep_events + math.floor(keep_events / {_SLACK})
  or (held > 1 and bytes > keep_bytes + math.floor(keep_bytes / {_SLACK})) then
  -- A bounded step, but more than was added.
  prune(keep_events, keep_bytes, keep_age ~= '' and now - keep_age or 0, math.max({PRUNE_EVENTS}, #fresh))
end
local answer = extent(mine)
answer[6] = text
return answer
"""

_PAGE: Final = """
local mine, last_seq, last_name, after = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local limit, max_bytes = tonumber(ARGV[5]), tonumber(ARGV[6])
local wrong = load()
if wrong then
  return wrong
elseif not log then
  return {'NONE'}
end
local answer, events = extent(mine), {}
answer[6] = (log.epoch ~= mine or is_right(last_seq, last_name)) and 1 or 0
local next, size, done = after + 1, 0, limit == 0
answer[7] = next
while not done do
  local asked = math.min(16, limit - #events / 2)
  local entries = redis.call('XRANGE', stream, int(next), '+', 'COUNT', asked)
  done = #entries < asked
  for _, entry in ipairs(entries) do
    local seq, body = tonumber(string.match(entry[1], '^%d+')), entry[2][2]
    size = size + size_of(body)
    if seq ~= next or (#events > 0 and size > max_bytes) then
      if #events == 0 then
        answer[7] = seq
      end
      done = true
      break
    end
    events[#events + 1] = entry[2][1]
    events[#events + 1] = body
    next = seq + 1
  end
  done = done or #events == 2 * limit
end
answer[8] = events
return answer
"""

_PRUNE: Final = """
local now, most = clock(ARGV[1]), tonumber(ARGV[5])
local keep_events, keep_bytes, keep_age = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local wrong = load()
if wrong then
  return wrong
elseif not log then
  return {'NONE'}
end
local more = prune(keep_events, keep_bytes, keep_age and now - keep_age or 0, most)
local answer = extent('')
answer[6] = more and 1 or 0
return answer
"""


class Script(NamedTuple):
    """A script, and the name the server knows it by once it was loaded."""

    text: str
    sha: str


def _script(text: str) -> Script:
    whole = _COMMON + text
    return Script(whole, sha1(whole.encode(), usedforsecurity=False).hexdigest())


OPEN: Final = _script(_OPEN)
BEGIN: Final = _script(_BEGIN)
APPEND: Final = _script(_APPEND)
PAGE: Final = _script(_PAGE)
PRUNE: Final = _script(_PRUNE)
