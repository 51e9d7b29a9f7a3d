/** A queue of steps that have been received and not shown yet, and the speed of the replay. Independent of the page. */

/** Steps are shown when they arrive. */
export const REAL_TIME = Infinity;
/** Steps are only shown on request. */
export const PAUSED = 0;

const MAX_BEHIND = 20_000; // steps; any more are shown at once, so that a forgotten tab does not fill the memory

export class Playback {
  #steps = [];
  #shown = 0; // when the last step was due, in ms

  constructor() {
    /** Steps per second, REAL_TIME or PAUSED. */
    this.pace = REAL_TIME;
  }

  /** The number of steps that have not been shown yet. */
  get behind() {
    return this.#steps.length;
  }

  /** Add steps at the end. */
  push(steps) {
    for (const step of steps) this.#steps.push(step);
  }

  /** Drop the steps that have not been shown. */
  clear() {
    this.#steps = [];
  }

  /**
   * Remove and return the steps that are due.
   * @param {number} now in ms, on a monotonic clock
   */
  due(now) {
    return this.#take(Math.max(this.#numDue(now), this.behind - MAX_BEHIND));
  }

  /** Remove and return the next step at any pace: an array of one step, or of none. */
  one() {
    return this.#take(1);
  }

  /** Remove and return all steps. */
  catchUp() {
    return this.#take(this.behind);
  }

  #numDue(now) {
    if (this.pace === REAL_TIME) return this.behind;
    if (this.pace === PAUSED) return 0;
    const period = 1000 / this.pace;
    // After an idle time the next step is due at once, but the idle time makes no further steps due.
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
