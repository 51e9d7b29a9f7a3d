/** The connection to `/live`. It is restored whenever it breaks, unless the server has no such stream. */

import { ApiError, events } from "./sse.js";

const MIN_PAUSE = 500; // ms before the next attempt; doubles up to MAX_PAUSE
const MAX_PAUSE = 5000;

/**
 * Receive messages until the server answers that it has no such stream.
 *
 * onState: called with "connecting", "live", "loading" (the server is loading its model, or draining), "lost",
 * "key" (a key is needed), "off" (the server runs without the live page) or "no_blocks" (it has no pool), and with the
 * server's message, if any. askKey: returns when another key has been entered.
 * @param {{onMessage: (message: object) => void, onState: (state: string, message?: string) => void,
 *          askKey: () => Promise<void>}} callbacks
 */
export async function listen({ onMessage, onState, askKey }) {
  let pause = MIN_PAUSE;
  onState("connecting");
  for (;;) {
    try {
      for await (const message of events("live")) {
        if (message.type === "pool") onState("live");
        onMessage(message);
        pause = MIN_PAUSE;
      }
      onState("lost");
    } catch (error) {
      const state = stateOf(error);
      onState(state, error.message);
      if (state === "off" || state === "no_blocks") return;
      if (state === "key") {
        await askKey();
        continue;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(2 * pause, MAX_PAUSE);
  }
}

function stateOf(error) {
  if (!(error instanceof ApiError)) return "lost";
  if (error.status === 401) return "key";
  if (error.status === 404) return "off";
  if (error.code === "no_blocks") return "no_blocks";
  return error.status === 503 ? "loading" : "lost";
}
