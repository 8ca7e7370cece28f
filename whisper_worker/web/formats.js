/**
 * A transcript as a file, made from lines that a person may have edited. What was not edited
 * comes out as the service writes it; a test holds the two together.
 */

const UNPRINTABLE = /[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029]+/g;

const WRITERS = {
  txt: (transcript) => transcript.segments.map((segment) => `${oneLine(segment.text)}\n`).join(""),
  srt: (transcript) =>
    cues(transcript.segments)
      .map(({ start, end, text }, index) => {
        const times = `${clock(start, ",", true)} --> ${clock(end, ",", true)}`;
        return `${index + 1}\n${times}\n${text.replaceAll("-->", "->")}\n\n`;
      })
      .join(""),
  vtt: (transcript) =>
    "WEBVTT\n\n" +
    cues(transcript.segments)
      .map(({ start, end, text }) => `${clock(start, ".", false)} --> ${clock(end, ".", false)}\n${escape(text)}\n\n`)
      .join(""),
  json: (transcript) => JSON.stringify(transcript, null, 1) + "\n",
};

export const MEDIA_TYPES = {
  txt: "text/plain;charset=utf-8",
  srt: "application/x-subrip;charset=utf-8",
  vtt: "text/vtt;charset=utf-8",
  json: "application/json",
};

/** The transcript in one of the formats, as a string. Lines that were emptied are left out. */
export function write(transcript, format) {
  const segments = transcript.segments.filter((segment) => oneLine(segment.text));
  return WRITERS[format]({ ...transcript, segments });
}

/** `m:ss`, with hours in front where there are any. */
export function shortTime(seconds) {
  const whole = Math.floor(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const rest = String(whole % 60).padStart(2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

function cues(segments) {
  return segments.map((segment) => {
    const words = segment.words ?? [];
    const start = milliseconds(words[0]?.start ?? segment.start);
    // A cue that lasts no time would never be seen.
    const end = Math.max(milliseconds(words.at(-1)?.end ?? segment.end), start + 1);
    return { start, end, text: oneLine(segment.text) };
  });
}

function clock(ms, decimalMark, withHours) {
  const two = (number) => String(number).padStart(2, "0");
  const [hours, minutes, seconds] = [Math.floor(ms / 3_600_000), Math.floor(ms / 60_000) % 60, Math.floor(ms / 1000) % 60];
  const front = withHours || hours ? `${two(hours)}:` : "";
  return `${front}${two(minutes)}:${two(seconds)}${decimalMark}${String(ms % 1000).padStart(3, "0")}`;
}

function milliseconds(seconds) {
  return Math.round(seconds * 1000);
}

function oneLine(text) {
  return text.replace(UNPRINTABLE, " ").trim();
}

function escape(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
