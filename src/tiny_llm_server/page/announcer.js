/** Announcements for screen readers: the end of an answer, and a summary of the pool every few seconds. */

const INTERVAL = 8000; // ms between two summaries

export class Announcer {
  #region = document.querySelector("#announcer");
  #timer = null;
  #summary = "";
  #make = () => "";

  /** Announce a text now. */
  say(text) {
    this.#region.textContent = text;
  }

  /** Announce the text that `make` returns at the next interval, if it has changed. */
  summarize(make) {
    this.#make = make;
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      const summary = this.#make();
      if (summary !== this.#summary) this.say(summary);
      this.#summary = summary;
    }, INTERVAL);
  }
}
