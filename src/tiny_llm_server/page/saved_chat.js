/** The conversation in sessionStorage: it survives a reload of its tab, and is gone when the tab is closed. */

const KEY = "tiny-llm chat";
const MAX_CHARACTERS = 200_000; // of all messages; the oldest are dropped first

/** Messages as the API takes them, and a question that has no answer yet. */
export function load() {
  try {
    const { messages, question } = JSON.parse(sessionStorage.getItem(KEY)) ?? {};
    const isValid = Array.isArray(messages) && messages.every(isMessage) && typeof question === "string";
    return isValid ? { messages, question } : { messages: [], question: "" };
  } catch { // not JSON, or a browser without storage
    return { messages: [], question: "" };
  }
}

/** Replace what is saved. */
export function save(messages, question = "") {
  let length = 0;
  const isOverLimit = ({ content }) => (length += content.length) > MAX_CHARACTERS;
  const numDropped = messages.findLastIndex(isOverLimit) + 1;
  let kept = messages.slice(numDropped);
  if (kept[0]?.role === "assistant") kept = kept.slice(1);
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ messages: kept, question }));
  } catch { // no storage, or it is full: the chat works, but does not survive a reload
  }
}

const isMessage = (one) => ["user", "assistant"].includes(one?.role) && typeof one.content === "string";
