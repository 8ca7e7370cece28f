/** The microphone as Float32 mono at 16 kHz, in frames of 100 ms. */

/**
 * @param {string} device id, or "" for the system's choice
 * @param {(frame: Float32Array) => void} onFrame
 * @param {() => void} onLost the device went away
 * @returns {Promise<{rate: number, stop: () => Promise<void>}>} the rate at which the device is heard
 */
export async function openMicrophone(device, onFrame, onLost) {
  const stream = await navigator.mediaDevices.getUserMedia({
    audio: {
      deviceId: device ? { exact: device } : undefined,
      channelCount: 1,
      // What makes a call pleasant takes the quiet words away.
      echoCancellation: false,
      noiseSuppression: false,
      autoGainControl: true,
    },
  });
  let context;
  try {
    const opened = await listen(stream);
    context = opened.context;
    const { node, source } = opened;
    stream.getTracks().forEach((track) => track.addEventListener("ended", onLost));
    let drained;
    const empty = new Promise((resolve) => (drained = resolve));
    node.port.onmessage = ({ data }) => (data === null ? drained() : data.length && onFrame(data));
    source.connect(node).connect(context.destination);
    await context.resume();
    const stop = async () => {
      node.port.postMessage("stop");
      // A context that the system has suspended never answers.
      await Promise.race([empty, new Promise((resolve) => setTimeout(resolve, 500))]);
      stream.getTracks().forEach((track) => track.stop());
      await context.close();
    };
    return { rate: context.sampleRate, stop };
  } catch (error) {
    stream.getTracks().forEach((track) => track.stop());
    await context?.close();
    throw error;
  }
}

/** At 16 kHz where the browser converts, and well; else (Firefox refuses) at the device's rate, for the worklet. */
async function listen(stream) {
  for (const options of [{ sampleRate: 16000 }, {}]) {
    const context = new AudioContext(options);
    try {
      const source = context.createMediaStreamSource(stream);
      await context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
      const node = new AudioWorkletNode(context, "capture");
      return { context, source, node };
    } catch (error) {
      await context.close();
      if (!options.sampleRate) throw error;
    }
  }
}
