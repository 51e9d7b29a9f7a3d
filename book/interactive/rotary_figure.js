/** `<rotary-figure>`: a key and a query that turn with their positions, and the score, which does not change. */

import { Picture, legend, svg } from "picture";
import { inverseFrequencies, parts, rotate } from "rotary";
import { SteppedFigure, select } from "stepped_figure";

const HEAD = [1, 1, 1, 1, 0, 0, 0, 0]; // before the rotation, each pair of the key and of the query points to the right
const LAST = 24; // the last position of the key
const FIRST = 3;
const DEFAULTS = { distance: "2", base: "100" };
const [RADIUS, WIDTH, HEIGHT] = [46, 150, 164]; // px, of a dial, and of the space for it

class RotaryFigure extends SteppedFigure {
  #selects = {};

  get name() {
    return "A key and a query that turn; arrow keys change their positions";
  }

  get numSteps() {
    return LAST + 1;
  }

  get firstStep() {
    return FIRST;
  }

  prepare() {
    const change = () => this.show(this.step);
    this.#selects = {
      distance: select("Distance", choices([0, 1, 2, 4, 8, 16]), DEFAULTS.distance, change),
      base: select("Base", choices([10, 100, 10000]), DEFAULTS.base, change),
    };
  }

  ownControls() {
    return [Object.values(this.#selects)];
  }

  reset() {
    for (const [name, value] of Object.entries(DEFAULTS)) this.#selects[name].querySelector("select").value = value;
    super.reset();
  }

  describe(step) {
    const { distance, frequencies, shares } = this.#at(step);
    const query = step + distance;
    const turned = `Pair 0 is turned by ${degrees(step)}° (key) and ${degrees(query)}° (query)`;
    const slow = `pair 3 by ${degrees(step * frequencies[3])}° and ${degrees(query * frequencies[3])}°`;
    return `The key is at position ${step}, the query at ${query}. ${turned}, ${slow}. `
      + `The score is ${shown(sum(shares))}, at every position, because the distance is ${distance}.`;
  }

  draw(step, width) {
    const { key, query, frequencies, shares } = this.#at(step);
    const columns = width >= 4 * WIDTH ? 4 : 2;
    const picture = new Picture();
    frequencies.forEach((frequency, pair) => {
      const [row, column] = [Math.floor(pair / columns), pair % columns];
      const [x, y] = [column * WIDTH + WIDTH / 2, row * HEIGHT];
      picture.label(x, y + 14, `pair ${pair}: (${pair}, ${pair + 4})`, "small", "middle");
      picture.label(x, y + 28, `${shown(degrees(frequency, 1), 1)}° per position`, "note", "middle");
      dial(picture, x, y + 84, [["orange", key, RADIUS - 14], ["blue", query, RADIUS - 2]], pair);
      picture.label(x, y + 150, `adds ${shown(shares[pair])}`, "small", "middle");
    });
    const y = HEIGHT * Math.ceil(4 / columns);
    const terms = columns === 4 ? shares.map((one) => shown(one)).join(" + ") : "sum of the four";
    picture.label(2, y + 14, `score = ${terms} = ${shown(sum(shares))}`, "text");
    legend(picture, 2, y + 38, { orange: "key", blue: "query" }, width - 10);
    return [picture.node("four pairs as hands on dials, one for the key and one for the query")];
  }

  /** The rotated key and query of a step, and what each pair adds to the score. */
  #at(step) {
    const [distance, base] = ["distance", "base"].map((name) => Number(this.#selects[name].querySelector("select").value));
    const frequencies = inverseFrequencies(HEAD.length, base);
    const [key, query] = [step, step + distance].map((position) => rotate(HEAD, position, frequencies));
    return { distance, frequencies, key, query, shares: parts(query, key) };
  }
}

/** A ring with a hand for each [hue, head, length]; positive angles turn counterclockwise. */
function dial(picture, x, y, hands, pair) {
  picture.add(svg("circle", { class: "ring", cx: x, cy: y, r: RADIUS }), x + RADIUS + 1, y + RADIUS + 1);
  for (const [hue, head, length] of hands) {
    const [tipX, tipY] = [x + length * head[pair], y - length * head[pair + 4]];
    const hand = svg("path", { d: `M${x} ${y} L${tipX.toFixed(1)} ${tipY.toFixed(1)}` });
    const tip = svg("circle", { cx: tipX.toFixed(1), cy: tipY.toFixed(1), r: 4 });
    picture.add(svg("g", { class: `${hue} curve` }, hand, tip), 0, 0);
  }
}

const choices = (numbers) => Object.fromEntries(numbers.map((number) => [number, number.toLocaleString("en")]));
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

/** Radians as degrees, with `digits` after the point. */
const degrees = (angle, digits = 0) => Number(((angle * 180) / Math.PI).toFixed(digits));

/** With two digits and a true minus sign. */
const shown = (number, digits = 2) => number.toFixed(digits).replace(/^-(?=0\.?0*$)/, "").replace("-", "\u2212");

customElements.define("rotary-figure", RotaryFigure);
