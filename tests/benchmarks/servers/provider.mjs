// A model provider of OpenAI's kind that answers every prompt with as many small deltas as its text asks for:
// "DELTAS n" makes n of them, as fast as they are taken. Says its port on stdout.
import http from 'node:http'

const server = http.createServer(async (request, response) => {
  let body = ''
  for await (const piece of request) body += piece
  const asked = JSON.parse(body || '{}')
  const texts = (asked.messages ?? []).filter(message => message.role === 'user').map(message => JSON.stringify(message.content))
  const count = Number(/DELTAS (\d+)/.exec(texts.at(-1) ?? '')?.[1] ?? 1)
  const whole = { id: 'chatcmpl-1', object: 'chat.completion.chunk', created: 1, model: asked.model }
  if (!asked.stream) {
    const message = { role: 'assistant', content: 'A title' }
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify({ ...whole, object: 'chat.completion', choices: [{ index: 0, message, finish_reason: 'stop' }] }))
    return
  }
  response.writeHead(200, { 'content-type': 'text/event-stream' })
  const say = (delta, finish_reason = null) => response.write(`data: ${JSON.stringify({ ...whole, choices: [{ index: 0, delta, finish_reason }] })}\n\n`)
  say({ role: 'assistant', content: '' })
  for (let i = 0; i < count && !response.destroyed; i++) {
    if (!say({ content: `delta ${i} ` })) await new Promise(resolve => response.once('drain', resolve).once('close', resolve))
    if (i % 20 === 19) await new Promise(resolve => setTimeout(resolve, 5))
  }
  say({}, 'stop')
  response.end('data: [DONE]\n\n')
})
server.listen(0, '127.0.0.1', () => console.log(server.address().port))
