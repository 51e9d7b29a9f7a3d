/** Counts and lists in sentences. */

/** "1 token", "2 tokens" */
export const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** "Block 1", "Blocks 1 and 2", "Blocks 1, 2 and 3" */
export const blocks = (ids) => `Block${ids.length === 1 ? "" : "s"} ${listed(ids)}`;

/** "1", "1 and 2", "1, 2 and 3" */
export const listed = (items) =>
  items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`;
