/** The field for an API key. It is shown when the server asks for one, and whoever asked tries again. */

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

  /** Ask for a key; returns when one was given. Raises the signal's reason where that is aborted before. */
  ask(signal) {
    if (this.#form.hidden) {
      this.#form.querySelector("[data-says]").textContent = savedKey()
        ? "This key is not one of the server's. Another one:"
        : "This server asks for an API key:";
      this.#form.classList.toggle("wrong", savedKey() !== "");
      this.#form.hidden = false;
      this.#form.elements.key.select();
    }
    if (signal) this.#form.elements.key.focus(); // somebody waits for it
    return new Promise((resolve, reject) => {
      this.#waiting.push(resolve);
      signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
    });
  }

  /** `events`, but a server that wants another key gets one. */
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
