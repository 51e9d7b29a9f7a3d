/** Steps that have come and have not been shown, and how fast they are shown. Knows nothing of the page. */

/** Shown as they come. */
export const REAL_TIME = Infinity;
/** Not shown until somebody asks. */
export const PAUSED = 0;

const MOST_BEHIND = 20_000; // steps; more are shown at once, so that a forgotten tab does not fill the memory

export class Playback {
  #steps = [];
  #shown = 0; // when the last step was due, in ms

  constructor() {
    /** Steps a second, REAL_TIME or PAUSED. */
    this.pace = REAL_TIME;
  }

  /** Steps that wait to be shown. */
  get behind() {
    return this.#steps.length;
  }

  /** Steps have come. */
  push(steps) {
    for (const step of steps) this.#steps.push(step);
  }

  /** Forget what has not been shown. */
  clear() {
    this.#steps = [];
  }

  /**
   * Take what is to be shown by now.
   * @param {number} now in ms, by a clock that never goes back
   */
  due(now) {
    return this.#take(Math.max(this.#numDue(now), this.behind - MOST_BEHIND));
  }

  /** Take the next step, whatever the pace; none where none has come. */
  one() {
    return this.#take(1);
  }

  /** Take all. */
  catchUp() {
    return this.#take(this.behind);
  }

  #numDue(now) {
    if (this.pace === REAL_TIME) return this.behind;
    if (this.pace === PAUSED) return 0;
    const period = 1000 / this.pace;
    // Who has waited for a step shows it at once; he has not saved up for more.
    if (!this.behind) this.#shown = now - period;
    this.#shown = Math.max(this.#shown, now - 4 * period);
    const count = Math.floor((now - this.#shown) / period);
    this.#shown += count * period;
    return count;
  }

  #take(count) {
    return this.#steps.splice(0, count);
  }
}
