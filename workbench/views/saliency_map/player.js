// A player of samples.

import { make } from "workbench/shared/dom.js";

/** A player of 16-bit samples; `tell` gets the second that plays, and null when nothing does. */
export function sound(samples, rate, tell) {
  const url = URL.createObjectURL(new Blob([header(samples.length, rate), samples], { type: "audio/wav" }));
  const element = make("audio", { controls: true, preload: "auto", src: url, "aria-label": "The audio" });
  let stop = Infinity;
  const follow = () => {
    if (element.currentTime >= stop) element.pause();
    if (element.paused) return tell(null);
    tell(element.currentTime);
    requestAnimationFrame(follow);
  };
  element.addEventListener("play", follow);
  element.addEventListener("seeked", () => tell(element.paused ? null : element.currentTime));
  return {
    element,
    play(from, to) {
      element.currentTime = from;
      stop = to;
      element.play();
    },
    close() {
      element.pause();
      URL.revokeObjectURL(url);
    },
  };
}

/** The 44 bytes before the samples of a WAV file: one channel, 16 bits. */
function header(count, rate) {
  const view = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  const numbers = [[4, 36 + 2 * count], [16, 16], [24, rate], [28, 2 * rate], [40, 2 * count]];
  for (const [at, value] of numbers) view.setUint32(at, value, true);
  for (const [at, value] of [[20, 1], [22, 1], [32, 2], [34, 16]]) view.setUint16(at, value, true);
  for (const [at, word] of [[0, "RIFF"], [8, "WAVE"], [12, "fmt "], [36, "data"]]) text(at, word);
  return view;
}
