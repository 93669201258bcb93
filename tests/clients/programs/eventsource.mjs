// npm `eventsource`.
import { EventSource } from "eventsource"
import { ended, report, url } from "./report.mjs"

const source = new EventSource(url)
source.onmessage = (message) => report(JSON.parse(message.data))
source.onerror = () => source.readyState === EventSource.CLOSED && ended()
