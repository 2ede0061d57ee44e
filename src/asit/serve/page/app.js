// The page: sends a recording to the server and shows the answer. Names of files and labels are written as text, never
// as HTML.
import * as draw from "/draw.js";
import * as lists from "/lists.js";
import { element } from "/lists.js";
import { ask, readable, Refusal } from "/server.js";
import { Clips, example, Microphone } from "/sound.js";

const at = (id) => document.getElementById(id);
const audio = at("audio");
const clips = new Clips(at("other"), async (number) => (await ask(`/api/clip/${number}`)).blob());
const CLIPS = 300; // neighbours requested: many may be of one recording
let model = null; // GET /api/model
let file = null; // the recording
let shown = null; // the answer of /api/analyse
let looked = null; // the answer of /api/attention
const asking = new Map(); // path of a request under way -> its AbortController
let microphone = null;

// ---- status and errors ----------------------------------------------------------------------------------------------

function say(text, busy = false) {
  at("status").textContent = text;
  at("busy").hidden = !busy;
  at("main").setAttribute("aria-busy", String(busy));
}

function complain(found, remedy = "", again = null) {
  say("");
  at("found").textContent = found;
  at("remedy").textContent = remedy;
  at("again").hidden = !again;
  at("again").onclick = again;
  at("error").hidden = false;
  at("error").scrollIntoView({ block: "nearest" });
}

async function guarded(doing) {
  try {
    await doing();
  } catch (error) {
    const again = () => {
      at("error").hidden = true;
      guarded(doing);
    };
    if (error.name !== "AbortError") complain(error.message, error.remedy, error.passing ? again : null);
  }
}

// ---- a recording comes in ------------------------------------------------------------------------------------------

function take(files) {
  if (!files.length) {
    complain("What was dropped is no file.", "Drop an audio file, or choose one.");
    return;
  }
  const given = files[0];
  at("error").hidden = true;
  if (!model) {
    complain("The page does not know the model yet.", "See whether asit serve still runs, and load the page again.");
    return;
  }
  const most = model.limits.megabytes;
  if (given.size > most * 1e6) {
    complain(`${given.name} has ${(given.size / 1e6).toFixed(1)} MB, and the server takes ${most} MB.`,
      "Cut it, or send it compressed (FLAC, Opus).");
    return;
  }
  if (!given.size) {
    complain(`${given.name} is empty.`);
    return;
  }
  for (const one of asking.values()) one.abort();
  asking.clear();
  file = given;
  looked = null;
  at("attend").checked = false;
  if (audio.src) URL.revokeObjectURL(audio.src);
  at("unplayable").hidden = true;
  audio.src = URL.createObjectURL(file);
  clips.stop();
  at("main").classList.add("begun");
  at("result").hidden = true; // it is another recording's
  shown = null;
  guarded(() => analyse(files.length > 1 ? ` (the first of ${files.length})` : ""));
}

async function send(path, what) {
  const own = new AbortController(), kind = path.split("?")[0];
  asking.get(kind)?.abort();
  asking.set(kind, own);
  say(what, true);
  try {
    const answer = await ask(path, { method: "POST", body: file, signal: own.signal });
    return await answer.json();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (!error.status && !(await readable(file))) {
      throw new Refusal({ found: `${file.name} cannot be read`, expected: "a file, and one that is still there" }, 400);
    }
    error.message = `${file.name}: ${error.message}`;
    throw error;
  } finally {
    if (asking.get(kind) === own) asking.delete(kind);
    if (!asking.size) say("");
  }
}

async function analyse(remark = "") {
  at("error").hidden = true;
  const query = new URLSearchParams({ top: 5, k: CLIPS });
  if (model.classes) {
    const length = at("window").validity.valid && Number(at("window").value), parts = Number(at("detail").value);
    query.set("threshold", String(least()));
    if (length && length !== model.seconds) query.set("window", String(length));
    if (parts > 1) query.set("hop", String((length || model.seconds) / parts));
  }
  const name = file.name;
  shown = { name, ...(await send(`/api/analyse?${query}`, `Listening to ${name}${remark}`)) };
  show();
}

// ---- what came back ------------------------------------------------------------------------------------------------

function show() {
  const { seconds, labels } = shown;
  at("result").hidden = false;
  at("title").textContent = shown.name;
  at("facts").textContent = [
    draw.clock(seconds, 2), `${(shown.rate / 1000).toLocaleString("en")} kHz`,
    shown.channels === 1 ? "mono" : `${shown.channels} channels`, shown.format,
    shown.rate === model.rate ? "" : `resampled to ${model.rate / 1000} kHz`,
  ].filter(Boolean).join(" \u00b7 ");
  draw.spectrogram(at("spectrogram"), shown.spectrogram, seconds);
  draw.colours(at("colours"), shown.embedding, seconds);
  scales();
  at("seek").setAttribute("aria-valuemax", seconds.toFixed(2));
  at("overlay").hidden = true;
  at("attended").hidden = at("heads").hidden = at("layers").hidden = true;
  at("unlabelled").hidden = labels !== null;
  at("labels").hidden = at("details").hidden = at("reading").hidden = labels === null;
  lists.tracks(at("tracks"), labels, seconds, least());
  if (labels) table(labels);
  neighbours(shown.neighbours, "To the whole recording:");
  if (at("attend").checked) guarded(attend);
  move();
}

function scales() {
  if (!shown) return;
  draw.timeAxis(at("axis"), shown.seconds, at("seek").clientWidth);
  draw.hertzAxis(at("hz"), shown.spectrogram.hz, at("seek").clientHeight);
}

function least() {
  return Number(at("threshold").value) / 100;
}

function table(labels) {
  const words = lists.percent(least());
  lists.table(at("rows"), labels, least(), playFrom);
  at("scoring").textContent = (labels.segments.length ? "" : `No label reaches ${words}. `) +
    "Highest: of a window. Mean: over the recording's windows, its score as a whole. Where: " +
    `windows that score ${words} or more.${labels.multi ? " A window may have several labels." : " A window has one label."}`;
}

async function nearestHere() {
  const length = model.index.seconds, last = shown.seconds - length;
  const start = Math.max(0, Math.min(last, audio.currentTime - length / 2));
  const query = new URLSearchParams({ k: CLIPS, start, seconds: length });
  const found = await send(`/api/neighbours?${query}`, "Looking for what sounds like this");
  neighbours(found.neighbours, `To ${draw.span(start, start + length)}:`);
}

function neighbours(list, to) {
  at("nearest").hidden = list === null;
  at("nearestto").textContent = to;
  at("here").hidden = !list || shown.seconds <= model.index.seconds;
  at("whole").hidden = !list || list === shown.neighbours;
  clips.stop();
  // A recording of the index that was sent again is no finding.
  const own = new Set((list || []).filter((one) => one.similarity > 0.995 && same(one.name)).map((one) => one.name));
  at("ranking").textContent = "In the order of their similarity; the bar runs from the least similar of the clips found " +
    `to the most similar.${own.size ? ` Left out: ${[...own].join(", ")}, the recording itself.` : ""}`;
  lists.neighbours(at("neighbours"), (list || []).filter((one) => !own.has(one.name)), playClip);
}

function same(name) {
  return name.split(/[\\/]/).pop() === shown.name;
}

function playClip(number, button) {
  audio.pause();
  guarded(() => clips.toggle(number, button));
}

async function map() {
  const found = await (await ask("/api/map")).json(), shares = `${Math.round(100 * found.explained)} %`;
  const which = found.points.length < found.total ? `${found.points.length} of ` : "";
  at("mapped").textContent = `${which}${found.total} clips on their two principal components, which hold ${shares} of the ` +
    "differences; near points sound alike to the model. A click plays a clip.";
  lists.plane(at("plane"), at("legend"), found, playClip);
  at("map").hidden = false;
}

// ---- attention -----------------------------------------------------------------------------------------------------

async function attend() {
  at("overlay").hidden = at("heads").hidden = at("layers").hidden = at("attended").hidden = !at("attend").checked;
  if (!at("attend").checked) return;
  const layer = Number(at("layer").value);
  if (!looked || looked.layer !== layer) {
    looked = null;
    at("overlay").hidden = true;
    try {
      looked = await send(`/api/attention?layer=${layer}`, "Looking where it looks");
    } catch (error) {
      if (error.name !== "AbortError") at("attend").checked = false;
      throw error;
    }
    at("overlay").hidden = false;
  }
  const head = Number(at("head").value);
  draw.attention(at("overlay"), looked, head, shown.seconds);
  at("attended").textContent = `Bright: what the class token of layer ${looked.layer + 1} attends to, ` +
    `${head < 0 ? `mean of ${looked.heads} heads` : `head ${head + 1} of ${looked.heads}`}, ` +
    (looked.bands === 1 ? "by moment: this model's patches span all frequencies." : "by moment and frequency.");
}

function choices(select, first, count, word) {
  if (first) select.append(element("option", first, { value: -1 }));
  for (let i = 0; i < count; i++) select.append(element("option", `${word}${i + 1}`, { value: i }));
}

// ---- playing -------------------------------------------------------------------------------------------------------

function move() {
  if (!shown) return;
  const now = Math.min(audio.currentTime, shown.seconds);
  for (const line of document.querySelectorAll(".playhead")) line.style.left = `${(100 * now) / shown.seconds}%`;
  at("time").textContent = `${draw.clock(now)} of ${draw.clock(shown.seconds)}`;
  at("seek").setAttribute("aria-valuenow", now.toFixed(2));
  const found = lists.labelsAt(shown.labels, shown.seconds, now, least());
  if (at("now").textContent !== found) at("now").textContent = found;
  at("seek").setAttribute("aria-valuetext", `${draw.clock(now)} of ${draw.clock(shown.seconds)} ${found}`.trim());
  if (!audio.paused) requestAnimationFrame(move);
}

function seek(seconds) {
  audio.currentTime = Math.max(0, Math.min(seconds, Math.max(0, shown.seconds - 0.01)));
  move();
}

function playFrom(seconds) {
  seek(seconds);
  audio.play().catch(() => {}); // the audio's own error event has the reason
}

function toggle() {
  if (audio.paused) audio.play().catch(() => {});
  else audio.pause();
}

for (const name of ["play", "pause", "ended"]) {
  audio.addEventListener(name, () => {
    const still = audio.paused;
    at("play").setAttribute("aria-label", still ? "Play" : "Pause");
    if (!still) clips.stop();
    move();
  });
}
audio.addEventListener("seeked", move);
audio.addEventListener("error", () => { at("unplayable").hidden = !audio.getAttribute("src"); });

at("play").addEventListener("click", toggle);
at("seek").addEventListener("keydown", (event) => {
  const step = Math.max(0.1, shown.seconds / 50);
  const to = { ArrowRight: audio.currentTime + step, ArrowLeft: audio.currentTime - step, Home: 0, End: shown.seconds,
    PageUp: audio.currentTime + 5 * step, PageDown: audio.currentTime - 5 * step }[event.key];
  if (to !== undefined) seek(to);
  else if (event.key === " " || event.key === "Enter") toggle();
  else return;
  event.preventDefault();
});
at("picture").addEventListener("click", (event) => {
  const plot = event.target.closest(".plot");
  if (!plot) return;
  const box = plot.getBoundingClientRect();
  playFrom(((event.clientX - box.left) / box.width) * shown.seconds);
});

// A hair line through the picture, with the time and the labels at the pointer.
at("picture").addEventListener("pointermove", (event) => {
  const plot = event.target.closest(".plot"), hair = at("hair");
  hair.hidden = !plot || event.pointerType === "touch";
  if (hair.hidden) return;
  const box = plot.getBoundingClientRect(), whole = at("picture").getBoundingClientRect();
  const part = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)), seconds = part * shown.seconds;
  const track = plot.parentElement.querySelector(".label");
  const found = lists.labelsAt(shown.labels, shown.seconds, seconds, least(), track?.textContent);
  hair.style.left = `${box.left - whole.left + part * box.width}px`;
  at("tip").style.top = `${Math.max(0, event.clientY - whole.top - 34)}px`;
  at("tip").className = part > 0.6 ? "left" : "";
  at("tip").textContent = [draw.clock(seconds, 2), found].filter(Boolean).join(" \u00b7 ");
});
at("picture").addEventListener("pointerleave", () => { at("hair").hidden = true; });

// ---- everything else that can be touched ---------------------------------------------------------------------------

at("file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
at("attend").addEventListener("change", () => guarded(attend));
at("head").addEventListener("change", () => guarded(attend));
at("layer").addEventListener("change", () => guarded(attend));
for (const name of ["window", "detail", "threshold"]) {
  at(name).addEventListener("change", () => guarded(() => analyse()));
}
at("threshold").addEventListener("input", () => { at("least").textContent = lists.percent(least()); });
at("example").addEventListener("click", () => guarded(async () => {
  if (!model?.index) take([example()]);
  else take([new File([await (await ask("/api/clip/0")).blob()], "example.wav", { type: "audio/wav" })]);
}));
at("here").addEventListener("click", () => guarded(nearestHere));
at("whole").addEventListener("click", () => neighbours(shown.neighbours, "To the whole recording:"));
at("download").addEventListener("click", () => {
  const { spectrogram, ...rest } = shown;
  const text = JSON.stringify({ model: model.name, ...rest, mels: spectrogram.mels }, null, 1);
  const link = element("a", undefined, { download: `${shown.name}.json` });
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});

function drop() {
  let depth = 0;
  const over = (by) => {
    depth = Math.max(0, depth + by);
    document.body.classList.toggle("over", depth > 0);
  };
  addEventListener("dragenter", () => over(1));
  addEventListener("dragleave", () => over(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    over(-depth);
    take(event.dataTransfer.files);
  });
}

async function record() {
  const button = at("record");
  if (microphone) {
    const made = microphone.stop();
    microphone = null;
    button.textContent = "Record";
    button.setAttribute("aria-pressed", "false");
    at("level").hidden = true;
    say("");
    if (made) take([made]);
    else complain("The microphone gave no sound.", "See whether another program holds it.");
    return;
  }
  at("error").hidden = true;
  audio.pause();
  clips.stop();
  const opened = new Microphone((peak, seconds) => {
    at("level").value = peak;
    const text = `Recording, ${Math.floor(seconds)} s`;
    if (at("status").textContent !== text) say(text);
    if (microphone === opened && model && seconds >= model.limits.seconds) record();
  });
  say("Waiting for the microphone");
  button.disabled = true; // until the user has answered the browser
  try {
    await opened.start();
  } catch (error) {
    const denied = error.name === "NotAllowedError";
    complain(denied ? "The browser was not allowed to use the microphone." : error.message || "There is no microphone.",
      denied ? "Allow it beside the address, and press Record again." : "");
    return;
  } finally {
    button.disabled = false;
  }
  microphone = opened;
  button.textContent = "Stop";
  button.setAttribute("aria-pressed", "true");
  at("level").hidden = false;
}

at("record").addEventListener("click", record);
addEventListener("resize", scales);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (!shown) return;
  lists.tracks(at("tracks"), shown.labels, shown.seconds, least()); // their colour is the theme's
  move();
});
drop();

guarded(async () => {
  model = await (await ask("/api/model")).json();
  document.title = `${model.name} \u00b7 asit`;
  const size = model.parameters >= 1e6 ? `${(model.parameters / 1e6).toFixed(1)} M` : `${Math.round(model.parameters / 1e3)} k`;
  at("model").textContent = [
    model.name, `${size} parameters`, model.classes ? `${model.classes.length} labels` : "no labels",
    `windows of ${model.seconds.toFixed(2)} s`, model.index ? `index of ${model.index.clips} clips` : "",
  ].filter(Boolean).join(" \u00b7 ");
  const minutes = model.limits.seconds / 60;
  at("takes").textContent = `${model.formats.join(", ")}; up to ${model.limits.megabytes} MB and ` +
    (minutes >= 1 ? `${Number(minutes.toFixed(1))} min.` : `${model.limits.seconds} s.`) + "\nYou will see " +
    (model.classes ? "which labels the model gives it and when, " : "") +
    `what the model attends to${model.index ? ", and which indexed recordings sound alike" : ""}.`;
  choices(at("head"), "mean of all", model.heads, "");
  choices(at("layer"), "", model.depth, "");
  at("layer").value = String(model.depth - 1);
  at("window").value = String(model.seconds);
  if (model.index) guarded(map);
});
