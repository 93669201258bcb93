// `@opencode-ai/sdk` v1, with nothing set but the address.
import { createOpencodeClient } from "@opencode-ai/sdk"
import { base, ended, path, query, report } from "./report.mjs"

const client = createOpencodeClient({ baseUrl: base })
const { stream } = await (path === "/global/event" ? client.global.event({ query }) : client.event.subscribe({ query }))
for await (const event of stream) report(event)
ended()
