/** The field for an API key. It appears when the server answers 401; the request is then sent again. */

import { ApiError, events, saveKey, savedKey } from "./sse.js";

export class KeyField {
  #form = document.querySelector("#key");
  #waiting = [];

  constructor() {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      saveKey(this.#form.elements.key.value.trim());
      this.#form.hidden = true;
      for (const resolve of this.#waiting.splice(0)) resolve();
    });
  }

  /** Show the field; returns when a key has been entered. Throws the signal's reason if it is aborted before. */
  ask(signal) {
    if (this.#form.hidden) {
      this.#form.querySelector("[data-prompt]").textContent = savedKey()
        ? "The server rejected this key. Enter another one:"
        : "This server needs an API key:";
      this.#form.classList.toggle("wrong", savedKey() !== "");
      this.#form.hidden = false;
      this.#form.elements.key.select();
    }
    if (signal) this.#form.elements.key.focus(); // only if the user's own request needs the key
    return new Promise((resolve, reject) => {
      this.#waiting.push(resolve);
      signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
    });
  }

  /** `events`, repeated with another key as long as the server answers 401. */
  async *events(path, options) {
    for (;;) {
      try {
        yield* events(path, options);
        return;
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 401) throw error;
        await this.ask(options.signal);
      }
    }
  }
}
