/** Talks to the service: its state, a recording handed in, the events of a job. */

/** What the service said was wrong, in its own words; `status` is 0 where it could not be asked. */
export class ServiceError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const UNREACHABLE = "The service cannot be reached. Check the connection, then try again.";
const LONGEST_WAIT = 10_000;

let key = sessionStorage.getItem("key") ?? "";

/** Show this key from now on. */
export function useKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

/** Model and queues of the service. Throws ServiceError. */
export async function state() {
  return (await call("status")).json();
}

/**
 * Upload a recording; gives the id of its job.
 *
 * `onUpload` hears the bytes sent and their number. An abort while bytes are under way stops the
 * upload; after the last byte the id is waited for all the same, because a job that nobody knows
 * could not be withdrawn. Throws ServiceError, and the signal's reason.
 */
export function handIn(file, fields, onUpload, signal) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    form.append("audio", file, file.name);
    // fetch cannot tell how far an upload is.
    const request = new XMLHttpRequest();
    let sent = false;
    request.open("POST", "jobs");
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onUpload(event.loaded, event.total);
    request.upload.onload = () => (sent = true);
    request.onload = () => {
      if (request.status !== 202) return reject(refusal(request.status, request.responseText));
      resolve(JSON.parse(request.responseText).id);
    };
    request.onerror = () => reject(new ServiceError(UNREACHABLE, 0));
    request.onabort = () => reject(signal.reason);
    signal.addEventListener("abort", () => sent || request.abort());
    request.send(form);
  });
}

/**
 * The events of a job, `{id, name, data}`, until it has ended. A connection that breaks is made
 * anew where it broke; meanwhile `{name: "lost"}` is given. Throws ServiceError, and the signal's reason.
 */
export async function* follow(job, signal) {
  let last = 0;
  let failures = 0;
  for (;;) {
    try {
      // Not an EventSource: it cannot show a key.
      const answer = await call(`jobs/${job}/events`, { signal, headers: last ? { "Last-Event-ID": last } : {} });
      if (answer.status === 204) return;
      for await (const event of parse(answer.body)) {
        [last, failures] = [event.id, 0];
        yield event;
        if (event.name === "done" || event.name === "error") return;
      }
    } catch (error) {
      signal.throwIfAborted();
      if (error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
    }
    if (failures) yield { name: "lost" };
    await pause(Math.min(LONGEST_WAIT, 250 * 2 ** failures++), signal);
  }
}

/** Stop a job and have it forgotten. Throws ServiceError. */
export async function withdraw(job) {
  await call(`jobs/${job}`, { method: "DELETE" });
}

async function call(path, { headers = {}, ...options } = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...authorization(), ...headers }, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServiceError(UNREACHABLE, 0);
  }
  if (!answer.ok) throw refusal(answer.status, await answer.text());
  return answer;
}

function authorization() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function refusal(status, body) {
  let message;
  try {
    message = JSON.parse(body).error.message;
  } catch {
    // A proxy in between answers in its own way.
  }
  return new ServiceError(message ?? `The service answered with status ${status}. Try again later.`, status);
}

async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A line break may be the last character that was there before.
      let from = Math.max(0, buffer.length - 1);
      buffer += value;
      for (let end; (end = buffer.indexOf("\n\n", from)) >= 0; from = 0) {
        const event = readEvent(buffer.slice(0, end));
        buffer = buffer.slice(end + 2);
        if (event.name) yield event;
      }
    }
  } finally {
    // Nothing to wait for: a connection that broke cannot be closed any better.
    reader.cancel().catch(() => {});
  }
}

function readEvent(block) {
  const fields = {};
  for (const line of block.split("\n")) {
    const colon = line.indexOf(": ");
    fields[line.slice(0, colon)] = line.slice(colon + 2);
  }
  return { id: Number(fields.id), name: fields.event, data: fields.data && JSON.parse(fields.data) };
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
