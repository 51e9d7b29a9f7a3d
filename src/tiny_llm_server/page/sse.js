/**
 * Server-sent events over fetch, which can send a body and an API key; EventSource can send neither.
 * The key stays in this tab: it is kept in sessionStorage.
 */

const KEY = "tiny-llm api key";
const SILENCE = 60_000; // ms; the server sends a comment long before

/** An answer that is an error. status: HTTP's; 200 for one that came in the middle of a stream. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Why an answer is not there, in words: the server's, or that there is no server. */
export const reasonOf = (error) =>
  error instanceof ApiError ? error.message : "the connection to the server is lost";

/** The key that requests bring, or "". */
export const savedKey = () => sessionStorage.getItem(KEY) ?? "";

/** Let requests bring this key from now on. */
export const saveKey = (key) => sessionStorage.setItem(KEY, key);

/**
 * The events of one answer, each parsed from its JSON; ends at `[DONE]` or where the answer ends.
 * Raises `ApiError` for an error in OpenAI's shape, and what fetch raises where nobody answers.
 * @param {string} path relative to the page
 * @param {{body?: object, signal?: AbortSignal, onAccepted?: (id: string) => void}} options
 *   body: posted as JSON; none: a GET. onAccepted: called with the answer's id, before anything of it is there
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
  const said = await response.json().catch(() => ({}));
  const error = said.error ?? {};
  return new ApiError(response.status, error.message ?? `HTTP ${response.status}`, error.code ?? null);
}

/** The data of each event; comments and other fields are passed over. */
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

/** Pieces of the answer as they come. Who leaves early hangs up. */
async function* texts(stream, watchdog) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const timer = setTimeout(() => watchdog.abort(new Error("the server is silent")), SILENCE);
      const { done, value } = await reader.read().finally(() => clearTimeout(timer));
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
