/** The table of requests: one row for each active sequence. */

export class Requests {
  #body = document.querySelector("#requests");
  #none = document.querySelector("#no-requests");
  #rows = new Map(); // sequence id -> {row, fields, seen}

  /**
   * onPoint: called with the id of the sequence under the pointer or with the focus, or null.
   * onChoose: called with the id of a sequence that is clicked.
   */
  constructor(pool, labels, known, { onPoint, onChoose }) {
    this.pool = pool;
    this.labels = labels;
    this.known = known;
    this.onChoose = onChoose;
    const idOf = (event) => event.target.closest?.("tr")?.dataset.id ?? null;
    for (const name of ["pointerover", "focusin"]) {
      this.#body.addEventListener(name, (event) => onPoint(idOf(event)));
    }
    for (const name of ["pointerleave", "focusout"]) this.#body.addEventListener(name, () => onPoint(null));
  }

  /** Redraw the rows that have changed. chosen: the id of the sequence whose block table stays in view. */
  update(chosen) {
    for (const [id, { row }] of this.#rows) {
      if (!this.pool.sequences.has(id)) {
        row.remove();
        this.#rows.delete(id);
      }
    }
    for (const sequence of this.pool.sequences.values()) this.#draw(sequence, sequence.id === chosen);
    this.#none.hidden = this.#rows.size > 0;
  }

  #draw(sequence, isChosen) {
    const line = this.#rows.get(sequence.id) ?? this.#newRow(sequence);
    const { name, text } = this.known.of(sequence);
    const blocks = sequence.tables.reduce((sum, table) => sum + table.blocks.length, 0);
    const [state, label, more] = stateOf(sequence);
    const letter = this.labels.of(sequence);
    const texts = [letter, name, tail(text), label, more, sequence.prompt, sequence.cached, sequence.outputs, blocks];
    const seen = `${texts.join("|")}|${isChosen}|${this.labels.hue(sequence)}`;
    if (seen === line.seen) return;
    line.seen = seen;
    line.fields.forEach((field, index) => setText(field, `${texts[index]}`));
    const [button] = line.fields;
    button.className = `name h${this.labels.hue(sequence)}`;
    button.setAttribute("aria-label", `Block table of ${letter}`);
    button.setAttribute("aria-pressed", isChosen);
    line.row.dataset.state = state;
  }

  #newRow(sequence) {
    const row = document.createElement("tr");
    row.dataset.id = sequence.id;
    const head = element("th", { scope: "row" });
    const button = element("button", { type: "button" });
    button.addEventListener("click", () => this.onChoose(sequence.id));
    head.append(button);
    const [what, state] = [twoLines("second preview"), twoLines("second")];
    const numbers = Array.from({ length: 4 }, () => element("td", { className: "number" }));
    row.append(head, what, state, ...numbers);
    this.#body.append(row);
    const line = { row, fields: [button, ...what.children, ...state.children, ...numbers], seen: "" };
    this.#rows.set(sequence.id, line);
    return line;
  }
}

const element = (name, properties) => Object.assign(document.createElement(name), properties);

function twoLines(className) {
  const cell = element("td", { className: "two" });
  cell.append(element("span", {}), element("span", { className }));
  return cell;
}

/** The end of a text, on one line. The cell is right-to-left to be cut on the left; marks keep punctuation in place. */
const tail = (text) => `\u200e${text.slice(-60).replace(/\s+/g, " ")}\u200e`;

/** The state of a sequence: a name for CSS, the text, and a second line. */
function stateOf(sequence) {
  const blocks = sequence.host_blocks;
  if (sequence.state === "running") return ["running", sequence.outputs ? "running" : "prefill", ""];
  if (blocks) return ["swapped", "swapped", `${blocks} block${blocks > 1 ? "s" : ""} on the host`];
  return sequence.preempted ? ["preempted", "preempted", "will be recomputed"] : ["waiting", "waiting", ""];
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
