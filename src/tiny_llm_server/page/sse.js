/**
 * Server-sent events over fetch, which can send a body and an API key, unlike EventSource. The key is stored in
 * sessionStorage, so only this tab has it.
 */

const KEY = "tiny-llm api key";
const TIMEOUT = 60_000; // ms without data; the server sends a comment much earlier

/** An error that the server answered with. status: the HTTP status; 200 for an error event in a stream. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The reason of an error for the user: the server's message, or that the connection is lost. */
export const reasonOf = (error) =>
  error instanceof ApiError ? error.message : "the connection to the server is lost";

/** The key that requests are sent with, or "". */
export const savedKey = () => sessionStorage.getItem(KEY) ?? "";

/** Send requests with this key from now on. */
export const saveKey = (key) => sessionStorage.setItem(KEY, key);

/**
 * The events of a response, parsed from JSON, up to `[DONE]` or the end of the response.
 * Throws `ApiError` for an error in OpenAI's format, and what fetch throws if there is no response.
 * @param {string} path relative to the page
 * @param {{body?: object, signal?: AbortSignal, onAccepted?: (id: string) => void}} options
 *   body: sent as JSON by POST; without it, a GET. onAccepted: called with the request's id before its first event
 * @returns {AsyncGenerator<object>}
 */
export async function* events(path, { body, signal, onAccepted } = {}) {
  const watchdog = new AbortController();
  const either = signal ? AbortSignal.any([signal, watchdog.signal]) : watchdog.signal;
  const response = await fetch(path, request(body, either));
  if (!response.ok) throw await errorOf(response);
  onAccepted?.(response.headers.get("X-Request-Id"));
  for await (const data of messages(response.body, watchdog)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(200, event.error.message, event.error.code);
    yield event;
  }
}

function request(body, signal) {
  const headers = { Accept: "text/event-stream" };
  if (savedKey()) headers.Authorization = `Bearer ${savedKey()}`;
  if (!body) return { headers, signal, cache: "no-store" };
  headers["Content-Type"] = "application/json";
  return { method: "POST", headers, signal, body: JSON.stringify(body) };
}

async function errorOf(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  return new ApiError(response.status, error.message ?? `HTTP ${response.status}`, error.code ?? null);
}

/** The data of each event. Comments and other fields are ignored. */
async function* messages(stream, watchdog) {
  let rest = "";
  for await (const text of texts(stream, watchdog)) {
    const parts = (rest + text).replaceAll("\r\n", "\n").split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

/** The text of a response as it arrives. Leaving the loop early closes the connection. */
async function* texts(stream, watchdog) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const timer = setTimeout(() => watchdog.abort(new Error("the server has sent nothing for a minute")), TIMEOUT);
      const { done, value } = await reader.read().finally(() => clearTimeout(timer));
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
