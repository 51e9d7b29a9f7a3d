/**
 * Draws pools, block tables and tokens as SVG: the shapes and classes of `figures/drawing.py` and `figures/blocks.py`,
 * so that interactive and static figures look the same. Colours are in the book's style sheet.
 */

const SVG = "http://www.w3.org/2000/svg";
const CHARACTER = 7.4; // px, the width of a character of a name or a chip, generously

export const HUES = ["blue", "orange", "green", "violet", "teal", "rose"];
export const CELL = 44; // the size of a block
export const GAP = 4; // the space between two blocks
const MARKS = ["lit", "dim"];
const SLOT = 24; // the width of a token's place within a block

/** A new SVG element. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A new HTML element. properties: of the object, such as `textContent`; names with a dash are attributes. */
export function html(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** A picture in the making; it grows with what is drawn. Later marks are drawn over earlier ones. */
export class Picture {
  #marks = [];
  width = 0;
  height = 0;

  /** One line of text on the baseline y. kind: "name", "text", "small", "note", "chip" or "head". */
  label(x, y, text, kind = "text", anchor = "start") {
    const right = x + { start: 1, middle: 0.5, end: 0 }[anchor] * text.length * CHARACTER;
    this.#add(svg("text", { class: kind, x, y, "text-anchor": anchor }, text), right, y + 4);
  }

  /**
   * A small box with centred text and a note below it.
   * @param {string} style a hue, "free", "panel" or "zone"; "blue orange" is a box that two sequences share. With
   *   "lit" its border is thick, with "dim" it is faint.
   */
  cell(x, y, width, height, style, text = "", note = "") {
    const words = style.split(" ");
    const [first, ...others] = words.filter((word) => !MARKS.includes(word));
    const marks = ["", ...words.filter((word) => MARKS.includes(word))].join(" ");
    const group = svg("g", { class: `${first} cell${marks}` }, svg("rect", { x, y, width, height, rx: 4 }));
    if (text) group.append(centred(x + width / 2, y + height / 2 + (note ? -1 : 4.5), text, "chip"));
    if (note) group.append(centred(x + width / 2, y + height / 2 + 12, note, "note"));
    this.#add(group, x + width + 1, y + height + 1);
    const part = width / others.length;
    others.forEach((hue, place) => {
      const stripe = { x: x + place * part, y: y + height - 6, width: part, height: 6, rx: 2 };
      this.#add(svg("g", { class: `${hue} stripe` }, svg("rect", stripe)), 0, 0);
    });
    return group;
  }

  /** A straight line. kind: "arrow", or "grid" for the faint lines of a chart. */
  line([x1, y1], [x2, y2], kind = "grid") {
    this.#add(svg("path", { class: kind, d: `M${x1} ${y1} L${x2} ${y2}` }), Math.max(x1, x2), Math.max(y1, y2));
  }

  /** Any SVG element, for which the picture grows to `right` and `bottom`. */
  add(mark, right, bottom) {
    this.#add(mark, right, bottom);
  }

  /** The picture as an element. title: what it shows, for screen readers. */
  node(title) {
    const [width, height] = [Math.ceil(this.width) + 2, Math.ceil(this.height) + 2];
    const attributes = { class: "figure", viewBox: `0 0 ${width} ${height}`, width, height };
    return svg("svg", { ...attributes, role: "img", "aria-label": title }, ...this.#marks);
  }

  #add(mark, right, bottom) {
    this.#marks.push(mark);
    this.width = Math.max(this.width, right);
    this.height = Math.max(this.height, bottom);
  }
}

const centred = (x, y, text, kind) => svg("text", { class: kind, x, y, "text-anchor": "middle" }, text);

/** @typedef {{style?: string, text?: string, note?: string, slots?: string[]}} Block slots: the tokens in it, or "" */

/** The width of a block that shows its tokens. */
export const slottedWidth = (blockSize) => blockSize * SLOT + 8;

/**
 * Blocks with their ids above, in rows of `columns`. Returns the y coordinate below them.
 * @param {Block[]} blocks
 */
export function pool(picture, x, y, blocks, { columns = blocks.length, first = 0 } = {}) {
  return grid(x, y, blocks, columns, CELL, CELL, (left, top, block, place) => {
    picture.label(left + CELL / 2, top - 6, `${first + place}`, "note", "middle");
    picture.cell(left, top, CELL, CELL, block.style || "free", block.text, block.note);
  });
}

/**
 * Blocks that show their tokens, with their ids above and the note below the tokens, in rows of `columns`.
 * @param {Block[]} blocks all with the same number of slots
 */
export function slottedPool(picture, x, y, blocks, columns = blocks.length) {
  const width = slottedWidth(blocks[0].slots.length);
  return grid(x, y, blocks, columns, width, 50, (left, top, block, place) => {
    picture.label(left + width / 2, top - 6, `${place}`, "note", "middle");
    picture.cell(left, top, width, 50, block.style || "free");
    block.slots.forEach((text, slot) => {
      picture.cell(left + 4 + slot * SLOT + 1, top + 5, SLOT - 2, 20, text ? "panel" : "free", text);
    });
    if (block.note) picture.label(left + width / 2, top + 38, block.note, "note", "middle");
  });
}

/** Draw each block by `draw(left, top, block, place)`, in rows of `columns`. Returns the y coordinate below them. */
export function grid(x, y, blocks, columns, width, height, draw) {
  blocks.forEach((block, place) => {
    const [row, column] = [Math.floor(place / columns), place % columns];
    draw(x + column * (width + GAP), y + row * (height + 22), block, place);
  });
  return y + Math.ceil(blocks.length / columns) * (height + 22) - 16;
}

/** A block table: the sequence's name, then the ids of its blocks. Returns the x coordinate to its right. */
export function table(picture, x, y, name, hue, ids, size = 34) {
  picture.label(x, y + 20, name, "name");
  const left = x + 9.5 * name.length + 10;
  ids.forEach((id, place) => picture.cell(left + place * (size + 2), y, size, 30, hue, `${id}`));
  return left + ids.length * (size + 2);
}

/** A row of tokens; an empty text is a place without a token. Returns the x coordinate to its right. */
export function tokens(picture, x, y, hue, texts, width = CELL) {
  texts.forEach((text, place) => picture.cell(x + place * (width + 2), y, width, 26, text ? hue : "free", text));
  return x + texts.length * (width + 2);
}

/** Small squares with their meaning, by style. Starts a new row at `width`; returns the y coordinate below. */
export function legend(picture, x, y, entries, width = Infinity) {
  let [left, top] = [x, y];
  for (const [style, text] of Object.entries(entries)) {
    const needed = 36 + 6.6 * text.length;
    if (left > x && left + needed > width) [left, top] = [x, top + 20];
    picture.cell(left, top - 11, 14, 14, style);
    picture.label(left + 20, top, text, "small");
    left += needed;
  }
  return top + 8;
}
