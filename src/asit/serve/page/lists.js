// Tables and lists of what was answered. Text goes in as text: `element` makes no HTML of it.
import * as draw from "/draw.js";

export function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Of the labels that are highest in any window: a row each, as high as the score; the first one has a scale.
export function tracks(root, labels, seconds, least) {
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
    const line = element("div", undefined, { class: "least" });
    line.style.bottom = `${100 * least}%`;
    plot.append(canvas, line, element("div", undefined, { class: "playhead" }));
    if (one === labels.tracks[0]) plot.append(element("span", "100 %", { class: "most", "aria-hidden": "true" }));
    row.append(element("div", one.label, { class: "label", dir: "auto", title: one.label }), plot);
    root.append(row);
  }
}

// The labels with a score of at least `least` at a time, the highest first; or one track's own score.
export function labelsAt(labels, seconds, at, least, only) {
  if (!labels) return "";
  const edges = draw.cells(labels.starts, labels.ends, seconds);
  const window = Math.max(0, Math.min(labels.starts.length - 1, edges.findLastIndex((edge) => edge <= at)));
  const found = labels.tracks.filter((one) => (only === undefined ? one.scores[window] >= least : one.label === only));
  found.sort((a, b) => b.scores[window] - a.scores[window]);
  return found.slice(0, 3).map((one) => `${one.label} ${percent(one.scores[window])}`).join(", ");
}

// The labels of the tracks, in their order.
export function table(root, labels, least, playFrom) {
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
    if (!spans.length) list.append(element("small", `below ${percent(least)}`));
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

// A row for each recording, by its nearest clip; up to `most` rows, with up to 4 further clips each. Bars run from the
// least similar clip of the answer to the most similar one, since cosines of one encoder lie close together.
export function neighbours(root, list, play, most = 8) {
  const similarities = list.map((one) => one.similarity), least = Math.min(...similarities);
  const range = Math.max(...similarities) - least || 1;
  const recordings = new Map();
  for (const one of list) {
    if (!recordings.has(one.name)) recordings.set(one.name, []);
    recordings.get(one.name).push(one);
  }
  root.replaceChildren(...[...recordings.values()].slice(0, most).map((clips, rank) => {
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
    const bar = score((best.similarity - least) / range, `${rank + 1}.`, "div");
    bar.title = `cosine similarity ${best.similarity.toFixed(3)}`;
    row.append(clip(best, play), words, bar);
    return row;
  }));
}

function clip(one, play, words = "") {
  const button = element("button", words, { type: "button", "aria-pressed": "false", class: "clip" });
  button.setAttribute("aria-label", `Play ${one.name}, ${draw.span(one.start, one.end)}`);
  button.addEventListener("click", () => play(one.number, button));
  return button;
}

// The clips of an index as points of a plane; colours are labels where there are few, else groups that sound alike.
export function plane(root, legend, found, play) {
  const labels = [...new Set(found.points.map((one) => one.label))].filter((one) => one !== null).sort();
  const named = labels.length > 0 && labels.length <= HUES, count = named ? labels.length : found.groups;
  const hue = (one) => (named ? labels.indexOf(one.label) : one.group);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "-1.05 -1.05 2.1 2.1");
  for (const one of found.points) {
    const point = document.createElementNS(SVG, "circle"), title = document.createElementNS(SVG, "title");
    title.textContent = [one.name, draw.span(one.start, one.end), one.label].filter(Boolean).join(" \u00b7 ");
    const place = { cx: one.x, cy: -one.y, r: 0.014, class: `hue${hue(one)}`, tabindex: 0, role: "button" };
    for (const [name, value] of Object.entries(place)) point.setAttribute(name, value);
    point.setAttribute("aria-label", `Play ${title.textContent}`);
    point.append(title);
    point.addEventListener("click", () => play(one.number, point));
    point.addEventListener("keydown", (event) => { if (event.key === "Enter") play(one.number, point); });
    svg.append(point);
  }
  root.replaceChildren(svg);
  legend.replaceChildren(...Array.from({ length: count }, (_, i) => {
    const row = element("li", undefined, { dir: "auto" });
    row.append(element("i", undefined, { class: `hue${i}` }), named ? labels[i] : `group ${i + 1}`);
    return row;
  }));
}

const HUES = 10, SVG = "http://www.w3.org/2000/svg"; // colours of style.css
