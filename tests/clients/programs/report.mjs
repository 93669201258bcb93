// What every client program prints: one JSON line for each event, without the padding.

export const { base, path, query } = JSON.parse(process.argv[2])

export const url = `${base}${path}${query ? `?${new URLSearchParams(query)}` : ""}`

const print = (line) => process.stdout.write(`${JSON.stringify(line)}\n`)

export function report(event) {
  const { id, type, properties } = event.payload ?? event
  const { pad, ...rest } = properties ?? {}
  print({ id, type, properties: pad === undefined ? rest : { ...rest, pad: pad.length } })
}

export const ended = () => print({ ended: true })
