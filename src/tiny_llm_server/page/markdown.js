/**
 * Renders the Markdown that chat models write: paragraphs, headings, lists, rules, code, bold, italics and links.
 *
 * The text is untrusted. It becomes text nodes and the elements that are created here, never HTML, and a link
 * keeps its address only if that is http(s). The work per character is bounded: a span of bold, italics or code
 * has at most 300 characters, nesting has a maximum depth, and a very long paragraph stays plain text.
 */

const MAX_INLINE = 8000; // characters of a paragraph
const MAX_LIST_DEPTH = 6;
const MAX_INLINE_DEPTH = 4;

const FENCE = /^(\s*)(`{3,}(?=[^`]*$)|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?: {0,3}\1){2,}\s*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(\S.*)$/;
// An item that can follow a paragraph without a blank line. A line such as "2024. …" cannot.
const INTERRUPTING_ITEM = /^\s*(?:[-*+]|1[.)])\s+\S/;

const INLINE = new RegExp([
  String.raw`\\(?<escaped>[\\\x60*_[\]()#.!+-])`,
  String.raw`(?<!\x60)(?<ticks>\x60+)(?!\x60)(?<code>[^]{1,300}?)(?<!\x60)\k<ticks>(?!\x60)`,
  String.raw`\*\*(?=[^\s*])(?<strong>[^]{1,300}?)(?<=\S)\*\*(?!\*)`,
  String.raw`(?<!\w)__(?=[^\s_])(?<strong_>[^]{1,300}?)(?<=\S)__(?!\w)`,
  String.raw`\*(?=[^\s*])(?<em>[^]{1,300}?)(?<=[^\s*])\*(?!\*)`,
  String.raw`(?<!\w)_(?=[^\s_])(?<em_>[^]{1,300}?)(?<=[^\s_])_(?!\w)`,
  String.raw`!?\[(?<label>[^[\]]{1,300})\]\((?<address>[^\s()<>]{1,1000})(?: "[^"\n]{0,200}")?\)`,
].join("|"), "g");

/** Shows a text that grows in an element: blocks that have not changed keep their nodes. */
export class Markdown {
  #element;
  #shown = []; // {key, node} of each block

  constructor(element) {
    this.#element = element;
  }

  /** Replace the text. */
  show(text) {
    const blocks = blocksOf(text);
    let same = 0;
    while (same < blocks.length && this.#shown[same]?.key === keyOf(blocks[same])) same += 1;
    for (const { node } of this.#shown.splice(same)) node.remove();
    for (const block of blocks.slice(same)) {
      const node = RENDERERS[block.kind](block.source);
      this.#shown.push({ key: keyOf(block), node });
      this.#element.append(node);
    }
  }
}

const keyOf = ({ kind, source }) => `${kind} ${source}`;

// Blocks.

/** The blocks of a text, in order: the kind of each and its lines. */
function blocksOf(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    const kind = kindOf(lines[at]);
    const end = kind === null ? at + 1 : ENDS[kind](lines, at);
    if (kind === "code") blocks.push({ kind, source: codeOf(lines, at, end) });
    else if (kind !== null) blocks.push({ kind, source: lines.slice(at, end).join("\n") });
    at = kind === "code" ? end + 1 : end;
  }
  return blocks;
}

/** The kind of the block that starts with a line; null for a blank line. */
function kindOf(line) {
  if (!line.trim()) return null;
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  return ITEM.test(line) ? "list" : "paragraph";
}

/** By kind: the index of the line after the block that starts at `at`; for code, that of the closing fence. */
const ENDS = {
  code(lines, at) {
    const fence = FENCE.exec(lines[at])[2];
    return endOf(lines, at, (line) => !isClosing(line.trim(), fence));
  },
  heading: (_, at) => at + 1,
  rule: (_, at) => at + 1,
  list(lines, at) {
    const [, indent, number] = ITEM.exec(lines[at]);
    const isOther = (item) => item[1].length < indent.length + 2 && !item[2] !== !number;
    const goesOn = (line) => (kindOf(line) === "list" ? !isOther(ITEM.exec(line)) : isIndented(line));
    let end = at + 1;
    for (let next = end; next < lines.length; next += 1) {
      if (goesOn(lines[next])) end = next + 1;
      else if (lines[next].trim()) break; // blank lines are part of a list only if it goes on after them
    }
    return end;
  },
  paragraph: (lines, at) => endOf(lines, at, (line) => {
    const kind = kindOf(line);
    return kind === "paragraph" || (kind === "list" && !INTERRUPTING_ITEM.test(line));
  }),
};

function endOf(lines, at, goesOn) {
  let end = at + 1;
  while (end < lines.length && goesOn(lines[end])) end += 1;
  return end;
}

const isIndented = (line) => /^\s{2,}\S/.test(line) && !FENCE.test(line);
const isClosing = (line, fence) => line.length >= fence.length && line === fence[0].repeat(line.length);

/** The lines between the fences, without the indentation of the first fence. */
function codeOf(lines, at, end) {
  const indent = FENCE.exec(lines[at])[1].length;
  const indentOf = (line) => line.length - line.trimStart().length;
  return lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line)))).join("\n");
}

const RENDERERS = {
  code: (source) => element("pre", element("code", source)),
  heading(source) {
    const [, marks, text] = HEADING.exec(source);
    return element(`h${Math.min(6, marks.length + 3)}`, ...inline(text)); // h1 to h3 belong to the page
  },
  rule: () => element("hr"),
  list: renderList,
  paragraph: (source) => element("p", ...inline(source)),
};

/** A list, with the lists in it; items that are nested deeper than MAX_LIST_DEPTH join the deepest list. */
function renderList(source) {
  const levels = []; // {indent, list}, outermost first
  const items = []; // {node, text}
  for (const line of source.split("\n")) {
    const [, { length: indent } = "", number, text] = ITEM.exec(line) ?? [];
    if (text === undefined) {
      if (line.trim()) items.at(-1).text += `\n${line.trim()}`;
      continue;
    }
    while (levels.length > 1 && indent < levels.at(-1).indent) levels.pop();
    if (!levels.length || (indent > levels.at(-1).indent + 1 && levels.length < MAX_LIST_DEPTH)) {
      const list = element(number ? "ol" : "ul");
      if (number) list.start = Number(number);
      items.at(-1)?.node.append(list);
      levels.push({ indent, list });
    }
    const node = element("li");
    levels.at(-1).list.append(node);
    items.push({ node, text });
  }
  for (const { node, text } of items) node.prepend(...inline(text));
  return levels[0].list;
}

// Spans.

/** The nodes of a text with inline marks. Marks that are not closed stay text. */
function inline(text, depth = 0) {
  if (depth === MAX_INLINE_DEPTH || text.length > MAX_INLINE) return [text];
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index), spanOf(match.groups, depth + 1));
    end = match.index + match[0].length;
  }
  return [...nodes, text.slice(end)].filter((node) => node !== "");
}

function spanOf({ escaped, code, strong, strong_, em, em_, label, address }, depth) {
  if (escaped) return escaped;
  if (code) return element("code", code.replace(/^ (.*\S.*) $/s, "$1"));
  if (strong ?? strong_) return element("strong", ...inline(strong ?? strong_, depth));
  if (em ?? em_) return element("em", ...inline(em ?? em_, depth));
  return link(inline(label, depth), address);
}

/** A link that opens in a new tab and has its address as a tooltip; only the text if the address is not http(s). */
function link(content, address) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return element("span", ...content);
  const { href } = new URL(address);
  return Object.assign(element("a", ...content), { href, title: href, target: "_blank", rel: "noopener noreferrer" });
}

function element(name, ...content) {
  const made = document.createElement(name);
  made.append(...content);
  return made;
}
