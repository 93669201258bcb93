// `@microsoft/fetch-event-source`, which takes its timers from `window`.
import { fetchEventSource } from "@microsoft/fetch-event-source"
import { ended, report, url } from "./report.mjs"

globalThis.window = globalThis
globalThis.document = { removeEventListener() {} }
await fetchEventSource(url, { openWhenHidden: true, onmessage: (message) => report(JSON.parse(message.data)) })
ended()
