/** `<beams-figure>`: recorded beam searches of the reference, with the blocks that the beams share. */

import { CELL, GAP, HUES, Picture, grid } from "picture";
import { SteppedFigure, select } from "stepped_figure";
import { counted } from "wording";

/**
 * A recorded step. beams: id, hue, sum of log-probabilities and block ids, best first. contents: the words in each
 * block. candidates: parent beam, word, sum, and the beam that it becomes or null. copies: source and target.
 * @typedef {{says: string, beams: [number, number, number, number[]][], contents: Object<string, string>,
 *            candidates: [number, string, number, number | null][], copies: [number, number][],
 *            logical: number, physical: number, ended: [string, number][]}} Frame
 */

const [NUM_BLOCKS, BLOCK_SIZE] = [12, 4];
const DEFAULT_WIDTH = "3";
const LABEL = 96; // px, for a beam's name and sum
const [ROW, HEIGHT] = [50, 44]; // px, of a beam, and of its blocks
const LINE = 18; // px
const LIST = 236; // px, the width of the list of candidates

class BeamsFigure extends SteppedFigure {
  #width = null;
  #searches = {};

  get name() {
    return "Beams and the pool; arrow keys change the step";
  }

  get numSteps() {
    return this.#frames.length;
  }

  get firstStep() {
    return 3;
  }

  prepare(data) {
    this.#searches = data;
    const widths = Object.fromEntries(Object.keys(data).map((width) => [width, `${width} beams`]));
    this.#width = select("Beam width", widths, DEFAULT_WIDTH, () => this.show(this.step));
  }

  ownControls() {
    return [[this.#width]];
  }

  describe(step) {
    return this.#frames[step].says;
  }

  reset() {
    this.#width.querySelector("select").value = DEFAULT_WIDTH;
    super.reset();
  }

  draw(step, width) {
    const picture = new Picture();
    const frame = this.#frames[step];
    const holders = holdersOf(frame);
    const right = this.#drawBeams(picture, frame, holders);
    const rows = Number(this.#width.querySelector("select").value);
    let y = 26 + rows * ROW;
    picture.label(2, y + 14, `the pool: ${counted(frame.physical, "block")} held;`, "small");
    picture.label(2, y + 30, `without sharing the beams would need ${frame.logical}`, "small");
    const ids = Array.from({ length: NUM_BLOCKS }, (_, block) => block);
    const targets = frame.copies.map(([, target]) => target);
    y = grid(2, y + 56, ids, 6, CELL, CELL, (left, top, block) => {
      picture.label(left + CELL / 2, top - 6, `${block}`, "note", "middle");
      picture.cell(left, top, CELL, CELL, ...look(block, frame, holders, targets));
    });
    if (width >= right + LIST) this.#drawLists(picture, right + 12, 14, frame);
    else this.#drawLists(picture, 2, y + 24, frame);
    return [picture.node("the beams with their blocks, the pool, and the candidates")];
  }

  get #frames() {
    return this.#searches[this.#width.querySelector("select").value];
  }

  /** A row for each beam: its words, block by block. Returns the x coordinate to the right of all. */
  #drawBeams(picture, { beams, contents, copies }, holders) {
    const targets = copies.map(([, target]) => target);
    const widths = [0, 1, 2].map((place) =>
      Math.max(34, ...beams.map(([, , , blocks]) => 7.2 * (contents[blocks[place]] ?? "").length + 12)));
    picture.label(2, 14, beams.length ? "beams, best first, with their logical blocks" : "no beam is left", "small");
    beams.forEach(([beam, hue, sum, blocks], row) => {
      const y = 24 + row * ROW;
      picture.cell(2, y + 5, 14, 14, HUES[hue]);
      picture.label(22, y + 17, `beam ${beam}`, "name");
      picture.label(22, y + 34, shown(sum), "small");
      let x = LABEL;
      blocks.forEach((block, place) => {
        const lit = targets.includes(block) ? " lit" : "";
        picture.cell(x, y, widths[place], HEIGHT, holders[block].join(" ") + lit, contents[block], `block ${block}`);
        x += widths[place] + 4;
      });
    });
    return LABEL + 12 + Math.max(390, widths.reduce((total, one) => total + one, 0));
  }

  /** The candidates of a step in which beams are chosen, and the hypotheses that have ended. */
  #drawLists(picture, x, y, { beams, candidates, ended }) {
    let line = y;
    const put = (text, kind = "text") => {
      picture.label(x, line, text, kind);
      line += LINE;
    };
    if (candidates.length) put("candidates, best first", "small");
    for (const [parent, word, sum, beam] of candidates) {
      put(`beam ${parent} + ${word}`);
      picture.label(x + 128, line - LINE, shown(sum), "small");
      picture.label(x + 172, line - LINE, fate(word, beam), "small");
    }
    if (candidates.length) line += 6;
    if (ended.length) put("ended, score per token", "small");
    for (const [text, score] of ended) {
      put(text);
      picture.label(x + 172, line - LINE, shown(score), "small");
    }
  }
}

/** The hues of the beams that hold each block. @param {Frame} frame */
function holdersOf({ beams }) {
  const holders = {};
  for (const [, hue, , blocks] of [...beams].sort(([a], [b]) => a - b)) {
    for (const block of blocks) (holders[block] ??= []).push(HUES[hue]);
  }
  return holders;
}

function look(block, { contents }, holders, targets) {
  if (!holders[block]) return ["free"];
  const filled = contents[block].split(" ").length;
  const style = holders[block].join(" ") + (targets.includes(block) ? " lit" : "");
  return [style, `${filled}/${BLOCK_SIZE}`, counted(holders[block].length, "ref")];
}

function fate(word, beam) {
  if (beam !== null) return `→ beam ${beam}`;
  return word === "." ? "ends" : "dropped";
}

const shown = (number) => number.toFixed(2).replace("-", "−");

customElements.define("beams-figure", BeamsFigure);
