/** The connection to `/live`: made again whenever it breaks, until the server says that there is none. */

import { ApiError, events } from "./sse.js";

const SOONEST = 500; // ms before another try; doubles up to LATEST
const LATEST = 5000;

/**
 * Listen for ever, or until the server says that it has no such stream.
 *
 * onState: called with "connecting", "live", "loading" (the server is there, the model is not, or drains),
 * "lost", "off" (the server was started without it) or "no_blocks" (there is no pool), and what the server said.
 * askKey: returns when there is another key to try.
 * @param {{onMessage: (message: object) => void, onState: (state: string, said?: string) => void,
 *          askKey: () => Promise<void>}} callbacks
 */
export async function listen({ onMessage, onState, askKey }) {
  let pause = SOONEST;
  onState("connecting");
  for (;;) {
    try {
      for await (const message of events("live")) {
        if (message.type === "pool") onState("live");
        onMessage(message);
        pause = SOONEST;
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
    pause = Math.min(2 * pause, LATEST);
  }
}

function stateOf(error) {
  if (!(error instanceof ApiError)) return "lost";
  if (error.status === 401) return "key";
  if (error.status === 404) return "off";
  if (error.code === "no_blocks") return "no_blocks";
  return error.status === 503 ? "loading" : "lost";
}
