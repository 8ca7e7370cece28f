/** Records from the microphone into a file. */

const TYPES = [
  ["audio/webm;codecs=opus", "webm"],
  ["audio/mp4", "m4a"],
  ["audio/ogg;codecs=opus", "ogg"],
];

const MESSAGES = {
  NotAllowedError: "The browser may not use the microphone. Allow it beside the address, then record again.",
  NotFoundError: "There is no microphone. Connect one, or choose a file.",
  NotReadableError: "The microphone is in use by another program. Close that, then record again.",
};

/** Nothing plays that could echo, and a model that knows noise does better than a filter that eats consonants. */
const SOUND = { echoCancellation: false, noiseSuppression: false, autoGainControl: true };

/** Why recording cannot work here at all; empty where it can. */
export function obstacle() {
  if (!globalThis.isSecureContext) return "Recording needs https, or a service on this very machine.";
  return navigator.mediaDevices && globalThis.MediaRecorder ? "" : "This browser cannot record.";
}

/** Begin to record; `onLevel` hears 0 to 1, ten times a second. Throws an Error that says what to do. */
export async function record(onLevel) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: SOUND });
  } catch (error) {
    throw new Error(MESSAGES[error.name] ?? "The microphone cannot be used. Choose a file instead.");
  }
  const [type, extension] = TYPES.find(([type]) => MediaRecorder.isTypeSupported(type)) ?? ["", "audio"];
  const recorder = new MediaRecorder(stream, type ? { mimeType: type } : {});
  const parts = [];
  recorder.ondataavailable = (event) => parts.push(event.data);
  const stopListening = listen(stream, onLevel);
  const file = new Promise((resolve) => {
    recorder.onstop = () => {
      stopListening();
      for (const track of stream.getTracks()) track.stop();
      resolve(new File(parts, `recording.${extension}`, { type: recorder.mimeType }));
    };
  });
  // In pieces, so that a long recording does not sit in the encoder.
  recorder.start(1000);
  return {
    /** End it; gives the File. */
    stop() {
      if (recorder.state !== "inactive") recorder.stop();
      return file;
    },
    /** Settled when it has ended, be it because the microphone was unplugged. */
    file,
  };
}

function listen(stream, onLevel) {
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  const timer = setInterval(() => {
    analyser.getFloatTimeDomainData(samples);
    onLevel(Math.min(1, samples.reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0)));
  }, 100);
  return () => {
    clearInterval(timer);
    context.close();
  };
}
