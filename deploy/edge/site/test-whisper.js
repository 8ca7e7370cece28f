/** The simplest client there can be: for finding out where it goes wrong. */
import { openMicrophone } from "./microphone.js";

const $ = (id) => document.getElementById(id);
const SOCKET = new URL("ws", location.href).href.replace(/^http/, "ws");
const FRAME = 1600;
/** How much faster than spoken the recording is sent. */
const SPEED = 4;

let finish = () => {};

function log(arrow, text) {
  $("messages").append(`${(performance.now() / 1000).toFixed(2)} ${arrow} ${text}\n`);
  $("messages").scrollTop = $("messages").scrollHeight;
}

function connect(onReady) {
  $("messages").textContent = "";
  $("verdict").textContent = "Connecting …";
  $("recording").disabled = $("microphone").disabled = true;
  const key = $("key").value.trim();
  const socket = new WebSocket(SOCKET, key ? ["whisper-live", `bearer.${key}`] : ["whisper-live"]);
  let sent = 0;
  const words = new Map();
  const send = (frame) => {
    if (socket.readyState !== WebSocket.OPEN) return;
    socket.send(frame);
    sent += frame.length;
  };
  socket.onopen = () => {
    const config = { uid: crypto.randomUUID(), language: null, task: "transcribe", model: "", use_vad: true };
    log("→", JSON.stringify(config));
    socket.send(JSON.stringify(config));
  };
  socket.onmessage = ({ data }) => {
    log("←", data);
    const message = JSON.parse(data);
    if (message.message === "SERVER_READY") {
      $("verdict").textContent = "Connected; sending sound.";
      $("stop").disabled = false;
      onReady(send);
    }
    for (const one of message.segments ?? []) if (one.completed) words.set(one.start, one.text);
  };
  socket.onclose = ({ code, reason }) => {
    log("×", `closed with ${code} ${reason}`);
    const text = [...words.values()].join("").trim();
    const seconds = (sent / 16000).toFixed(1);
    $("verdict").textContent = text
      ? `Heard, in ${seconds} s of sound: ${text}`
      : `Closed with ${code} after ${seconds} s of sound, without a word.`;
    $("stop").disabled = true;
    $("recording").disabled = $("microphone").disabled = false;
    finish();
  };
  return () => {
    log("→", "END_OF_AUDIO");
    if (socket.readyState === WebSocket.OPEN) socket.send(new TextEncoder().encode("END_OF_AUDIO"));
  };
}

/** 16-bit mono at 16 kHz behind a header of 44 bytes, as the file beside this page is. */
async function recording() {
  const response = await fetch("test-audio.wav");
  const samples = new Int16Array((await response.arrayBuffer()).slice(44));
  const sound = Float32Array.from(samples, (sample) => sample / 32768);
  let place = 0;
  const end = connect((send) => {
    const timer = setInterval(() => {
      send(sound.slice(place, place + FRAME));
      place += FRAME;
      if (place < sound.length) return;
      clearInterval(timer);
      end();
    }, 100 / SPEED);
    finish = () => clearInterval(timer);
  });
  $("stop").onclick = end;
}

function microphone() {
  const end = connect(async (send) => {
    try {
      const opened = await openMicrophone("", send, end);
      log("·", `microphone at ${opened.rate} Hz, sent as Float32 at 16000 Hz`);
      finish = () => opened.stop();
      $("stop").onclick = async () => {
        await opened.stop();
        end();
      };
    } catch (error) {
      log("·", `no microphone: ${error.name}`);
      end();
    }
  });
}

$("options").addEventListener("submit", (event) => event.preventDefault());
$("recording").addEventListener("click", recording);
$("microphone").addEventListener("click", microphone);
$("recording").disabled = $("microphone").disabled = false; // a click before this line would be lost
