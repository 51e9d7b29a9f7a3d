/**
 * The base of figures in which the reader acts: the steps are operations. At first they tell a prepared story; an
 * operation of the reader's replaces the steps after the current one.
 */

import { SteppedFigure } from "stepped_figure";

const MAX_OPERATIONS = 200;

export class OperationsFigure extends SteppedFigure {
  #operations = [];
  #states = [];

  /** The prepared operations. @returns {object[]} */
  get story() {
    return [];
  }

  /** A new model, as it is before the first operation. */
  newModel() {
    return null;
  }

  /** Change the model by an operation. @returns {string} what happened, a sentence */
  apply(model, operation) {
    return "";
  }

  /** What the picture needs to know of a model, which changes later. */
  snapshot(model) {
    return {};
  }

  /** What is said before the first operation. */
  get opening() {
    return "";
  }

  get numSteps() {
    return this.#states.length;
  }

  /** The snapshot of the current step. */
  get state() {
    return this.#states[this.step].snapshot;
  }

  prepare() {
    this.replay(this.story);
  }

  describe(step) {
    return this.#states[step].says;
  }

  reset() {
    this.replay(this.story);
    super.reset();
  }

  /** Compute the states of these operations; the picture stays as it is. */
  replay(operations) {
    const model = this.newModel();
    this.#operations = operations;
    this.#states = [{ says: this.opening, snapshot: this.snapshot(model) }];
    for (const operation of operations) {
      const says = this.apply(model, operation);
      this.#states.push({ says, snapshot: this.snapshot(model) });
    }
  }

  /** Do an operation in the current step, and forget the steps after it. */
  perform(operation) {
    if (this.step >= MAX_OPERATIONS) {
      this.say("That was the last step of this figure: go back, or reset it.");
      return;
    }
    this.replay([...this.#operations.slice(0, this.step), operation]);
    this.show(this.numSteps - 1);
  }
}
