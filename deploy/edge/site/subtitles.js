/** Finished lines as files. @typedef {{start: number, end: number, text: string}} Line */

/** @param {Line[]} lines */
export function toText(lines) {
  return lines.map((line) => `${line.text.trim()}\n`).join("");
}

/** @param {Line[]} lines */
export function toSrt(lines) {
  return lines
    // An arrow inside a text would end its cue in some readers.
    .map(({ start, end, text }) => `${clock(start)} --> ${clock(end)}\n${text.trim().replaceAll("-->", "->")}\n`)
    .map((cue, place) => `${place + 1}\n${cue}\n`)
    .join("");
}

/** @param {number} seconds @returns {string} 00:00:00,000 */
function clock(seconds) {
  const total = Math.round(seconds * 1000);
  const part = (unit, size) => String(Math.floor(total / unit) % size).padStart(2, "0");
  return `${part(3600000, 1000)}:${part(60000, 60)}:${part(1000, 60)},${String(total % 1000).padStart(3, "0")}`;
}
