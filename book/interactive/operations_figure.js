/**
 * The base of figures in which the reader acts: the steps are operations on a model. At first they tell a prepared
 * story; an operation of the reader's replaces the steps after the current one.
 */

import { SteppedFigure } from "stepped_figure";

const MAX_OPERATIONS = 200;

export class OperationsFigure extends SteppedFigure {
  #operations = [];
  #sentences = []; // what each operation has done
  #model = null; // after the first `#at` operations
  #at = null;

  /** The prepared operations. @returns {object[]} */
  get story() {
    return [];
  }

  /** What is said before the first operation. */
  get opening() {
    return "";
  }

  /** A new model, as it is before the first operation. */
  newModel() {
    return null;
  }

  /** Change the model by an operation. @returns {string} what happened, a sentence */
  apply(model, operation) {
    return "";
  }

  /** The model after the current step. */
  get model() {
    if (this.#at !== this.step) {
      this.#model = this.newModel();
      for (const operation of this.#operations.slice(0, this.step)) this.apply(this.#model, operation);
      this.#at = this.step;
    }
    return this.#model;
  }

  /** The operation of the next step; undefined in the last one. */
  get nextOperation() {
    return this.#operations[this.step];
  }

  /** The operation of the current step; undefined in step 0. */
  get lastOperation() {
    return this.#operations[this.step - 1];
  }

  get numSteps() {
    return this.#operations.length + 1;
  }

  prepare() {
    this.#replay(this.story);
  }

  describe(step) {
    return step ? this.#sentences[step - 1] : this.opening;
  }

  reset() {
    this.#replay(this.story);
    super.reset();
  }

  /** Do an operation in the current step, and forget the steps after it. */
  perform(operation) {
    if (this.step >= MAX_OPERATIONS) {
      this.say("That was the last step of this figure: go back, or reset it.");
      return;
    }
    this.#replay([...this.#operations.slice(0, this.step), operation]);
    this.show(this.numSteps - 1);
  }

  /** Do all operations again with a model of another kind, and stay at the current step. */
  rebuild() {
    this.#replay(this.#operations);
    this.show(this.step);
  }

  #replay(operations) {
    const model = this.newModel();
    this.#operations = operations;
    this.#sentences = operations.map((operation) => this.apply(model, operation));
    this.#at = null;
  }
}
