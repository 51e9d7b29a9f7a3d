/**
 * The base of all interactive figures: a picture of one of several steps, a sentence about it, and controls.
 *
 * A subclass has `numSteps`, `firstStep`, `draw` and `describe`, and may have controls of its own. The arrow keys,
 * Home and End change the step while the figure has the focus.
 */

import { html } from "picture";

const PACE = 1600; // ms between two steps while the figure plays

export class SteppedFigure extends HTMLElement {
  #step = 0;
  #timer = null;
  #parts = null;
  #width = 0;

  /** The number of steps, at least 1. */
  get numSteps() {
    return 1;
  }

  /** The step that is shown first. */
  get firstStep() {
    return 0;
  }

  /** Read the figure's data, before anything else. @param {any} data the JSON of the page, or null */
  prepare(data) {}

  /** Rows of further controls: arrays of elements. @returns {Element[][]} */
  ownControls() {
    return [];
  }

  /** The picture of a step for a width in pixels. @returns {Element[]} */
  draw(step, width) {
    return [];
  }

  /** A sentence that says what happened in a step. */
  describe(step) {
    return "";
  }

  /** Update the figure's own controls for a step, before it is drawn. */
  update(step) {}

  /** Go back to the start. */
  reset() {
    this.show(this.firstStep);
  }

  get step() {
    return this.#step;
  }

  connectedCallback() {
    if (!this.#parts) {
      const script = this.querySelector('script[type="application/json"]');
      this.prepare(script ? JSON.parse(script.textContent) : null);
      this.#build();
      this.addEventListener("keydown", (event) => this.#key(event));
    }
    new ResizeObserver(() => this.#fit()).observe(this.#parts.picture);
    this.show(this.firstStep);
  }

  disconnectedCallback() {
    this.#pause();
  }

  /** Show a step; redraws even if it is shown already. */
  show(step) {
    const { says, slider, place, back, next } = this.#parts;
    const last = this.numSteps - 1;
    this.#step = Math.max(0, Math.min(last, step));
    this.update(this.#step);
    this.redraw();
    setText(says, this.describe(this.#step));
    slider.max = last;
    slider.value = this.#step;
    setText(place, `${this.#step} of ${last}`);
    slider.setAttribute("aria-valuetext", `step ${this.#step} of ${last}`);
    enable(back, this.#step > 0);
    enable(next, this.#step < last);
  }

  /** Draw the picture again, because something other than the step has changed. */
  redraw() {
    const { picture } = this.#parts;
    this.#width = picture.clientWidth;
    picture.replaceChildren(...this.draw(this.#step, this.#width));
  }

  /** Say something that is not the description of a step. */
  say(text) {
    setText(this.#parts.says, text);
  }

  #build() {
    const back = button("Back", () => this.#go(this.#step - 1));
    const next = button("Next", () => this.#go(this.#step + 1));
    const play = button("Play", () => (this.#timer ? this.#pause() : this.#play()));
    const slider = html("input", { type: "range", min: 0, step: 1 });
    slider.addEventListener("input", () => this.#go(Number(slider.value)));
    const place = html("span", { className: "place" });
    const reset = button("Reset", () => {
      this.#pause();
      this.reset();
    });
    const picture = html("div", { className: "picture", tabIndex: 0, role: "group", "aria-label": this.name });
    const says = html("p", { className: "says", "aria-live": "polite" });
    const steps = [back, next, play, html("label", {}, "Step", slider), place, reset];
    const rows = [steps, ...this.ownControls()].map((row) => html("div", { className: "controls" }, ...row));
    this.#parts = { picture, says, slider, place, back, next, play };
    this.replaceChildren(...rows, says, picture);
  }

  /** The figure's name, for screen readers. */
  get name() {
    return "Interactive figure; arrow keys change the step";
  }

  #go(step) {
    this.#pause();
    this.show(step);
  }

  #play() {
    if (this.#step === this.numSteps - 1) this.show(0);
    this.#timer = setInterval(() => {
      this.show(this.#step + 1);
      if (this.#step === this.numSteps - 1) this.#pause();
    }, PACE);
    this.#parts.play.textContent = "Pause";
    this.#parts.says.setAttribute("aria-live", "off"); // otherwise a screen reader falls behind
  }

  #pause() {
    clearInterval(this.#timer);
    this.#timer = null;
    this.#parts.play.textContent = "Play";
    this.#parts.says.setAttribute("aria-live", "polite");
  }

  #fit() {
    if (this.#parts.picture.clientWidth !== this.#width) this.redraw();
  }

  /** The keys that the figure uses must not reach the page, where they turn to another chapter or open the search. */
  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key !== "Tab" && event.key !== "Escape") event.stopPropagation();
    if (event.target.matches("input, select, textarea")) return;
    const steps = { ArrowLeft: this.#step - 1, ArrowRight: this.#step + 1, Home: 0, End: this.numSteps - 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.#go(steps[event.key]);
  }
}

/** A button. It stays in the tab order while it is disabled, so that the focus does not jump. */
export function button(text, onPress) {
  const element = html("button", { type: "button", textContent: text });
  element.addEventListener("click", () => {
    if (element.getAttribute("aria-disabled") !== "true") onPress();
  });
  return element;
}

/** Enable or disable a button that `button` has made. */
export function enable(element, isEnabled) {
  element.setAttribute("aria-disabled", `${!isEnabled}`);
}

/** A labelled select. options: texts by value. */
export function select(label, options, value, onChange) {
  const choices = Object.entries(options).map(([key, text]) => html("option", { value: key, textContent: text }));
  const element = html("select", {}, ...choices);
  element.value = value;
  element.addEventListener("change", () => onChange(element.value));
  return html("label", {}, label, element);
}

/**
 * A labelled slider with its value as text. limits: least, most and step. shown: the text of a value. An assignment to
 * `value` moves the slider without calling `onChange`.
 * @returns {{label: Element, value: number}}
 */
export function slider(label, [min, max, step], value, shown, onChange) {
  const input = html("input", { type: "range", min, max, step });
  const text = html("span", { className: "place", "aria-hidden": "true" });
  const own = {
    label: html("label", {}, label, input, text),
    get value() {
      return Number(input.value);
    },
    set value(number) {
      input.value = number;
      text.textContent = shown(own.value);
      input.setAttribute("aria-valuetext", text.textContent);
    },
  };
  input.addEventListener("input", () => {
    own.value = own.value;
    onChange(own.value);
  });
  own.value = value;
  return own;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
