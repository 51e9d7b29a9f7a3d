/** What a screen reader is told: the end of an answer, and now and then how the pool is doing. */

const SILENCE = 8000; // ms between two summaries

export class Announcer {
  #region = document.querySelector("#announcer");
  #timer = null;
  #summary = "";
  #make = () => "";

  /** Say something now. */
  say(text) {
    this.#region.textContent = text;
  }

  /** Say later what `make` returns then, if that is news; at most once in a while. */
  summarise(make) {
    this.#make = make;
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      const summary = this.#make();
      if (summary !== this.#summary) this.say(summary);
      this.#summary = summary;
    }, SILENCE);
  }
}
