// Tables and lists of what was answered. Text goes in as text: `element` makes no HTML of it.
import * as draw from "/draw.js";

export function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Of the labels that are highest in any window: a row each, the darker the higher.
export function tracks(root, labels, seconds) {
  root.replaceChildren();
  if (!labels) return;
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--track").trim();
  for (const one of labels.tracks) {
    const best = one.scores.indexOf(Math.max(...one.scores));
    const row = element("div", undefined, { class: "track" });
    const plot = element("div", undefined, { class: "plot" }), canvas = element("canvas", undefined, { role: "img" });
    canvas.setAttribute("aria-label", `${one.label}: highest ${percent(one.scores[best])}, ` +
      draw.span(labels.starts[best], labels.ends[best]));
    draw.track(canvas, one.scores, labels.starts, labels.ends, seconds, colour);
    plot.append(canvas, element("div", undefined, { class: "playhead" }));
    row.append(element("div", one.label, { class: "label", dir: "auto", title: one.label }), plot);
    root.append(row);
  }
}

// The labels with a score of at least `least` at a time, the highest first; or one track's own score.
export function labelsAt(labels, seconds, at, only, least = 0.5) {
  if (!labels) return "";
  const edges = draw.cells(labels.starts, labels.ends, seconds);
  const window = Math.max(0, Math.min(labels.starts.length - 1, edges.findLastIndex((edge) => edge <= at)));
  const found = labels.tracks.filter((one) => (only === undefined ? one.scores[window] >= least : one.label === only));
  found.sort((a, b) => b.scores[window] - a.scores[window]);
  return found.slice(0, 3).map((one) => `${one.label} ${percent(one.scores[window])}`).join(", ");
}

// The labels of the tracks, in their order.
export function table(root, labels, playFrom) {
  const rows = new Map(labels.tracks.map((track) => [track.label, []]));
  for (const part of labels.segments) rows.get(part.label)?.push(part);
  root.replaceChildren(...[...rows].map(([label, spans]) => {
    const row = element("tr"), where = element("td"), list = element("div");
    const { clip, highest } = labels.scores[label];
    list.className = "spans";
    for (const part of spans.slice(0, 12)) {
      const times = draw.span(part.start, part.end);
      const button = element("button", times, { type: "button", "aria-label": `Play ${label}, ${times}` });
      button.title = `${percent(part.score)}; plays from here`;
      button.addEventListener("click", () => playFrom(part.start));
      list.append(button);
    }
    if (spans.length > 12) list.append(element("span", `and ${spans.length - 12} more`));
    where.append(list);
    row.append(element("td", label, { dir: "auto" }), score(highest), element("td", percent(clip)), where);
    return row;
  }));
}

function score(value, words = percent(value), kind = "td") {
  const cell = element(kind, undefined, { class: "score" }), bar = element("span", undefined, { class: "bar", "aria-hidden": "true" });
  const part = element("i");
  part.style.width = `${100 * value}%`;
  bar.append(part);
  cell.append(bar, words);
  return cell;
}

export function percent(score) {
  return `${(100 * score).toFixed(score < 0.0995 ? 1 : 0)} %`;
}

// A row for each recording, by its nearest clip; up to `most` rows, with up to 4 further clips each.
export function neighbours(root, list, play, most = 8) {
  const recordings = new Map();
  for (const one of list) {
    if (!recordings.has(one.name)) recordings.set(one.name, []);
    recordings.get(one.name).push(one);
  }
  root.replaceChildren(...[...recordings.values()].slice(0, most).map((clips) => {
    const [best, ...further] = clips, row = element("li"), words = element("div"), times = element("div");
    times.className = "spans";
    words.append(element("div", best.name, { class: "path", dir: "auto" }), times);
    times.append(element("small", draw.span(best.start, best.end)));
    if (best.label) times.append(element("small", best.label, { dir: "auto" }));
    if (further.length) times.append(element("small", "also"));
    for (const one of further.slice(0, 4)) {
      const button = clip(one, play, draw.span(one.start, one.end));
      button.title = `similarity ${one.similarity.toFixed(3)}`;
      times.append(button);
    }
    row.append(clip(best, play), words, score(Math.max(0, best.similarity), best.similarity.toFixed(3), "div"));
    return row;
  }));
}

function clip(one, play, words = "") {
  const button = element("button", words, { type: "button", "aria-pressed": "false", class: "clip" });
  button.setAttribute("aria-label", `Play ${one.name}, ${draw.span(one.start, one.end)}`);
  button.addEventListener("click", () => play(one.number, button));
  return button;
}
