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

export function table(root, labels, playFrom) {
  const rows = new Map(labels.tags.map((tag) => [tag.label, []]));
  for (const part of labels.segments) {
    if (!rows.has(part.label)) rows.set(part.label, []);
    rows.get(part.label).push(part);
  }
  const sorted = [...rows].sort((a, b) => labels.scores[b[0]].clip - labels.scores[a[0]].clip);
  root.replaceChildren(...sorted.map(([label, spans]) => {
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

function score(value) {
  const cell = element("td"), bar = element("span", undefined, { class: "bar", "aria-hidden": "true" });
  const part = element("i");
  part.style.width = percent(value).replace(" ", "");
  bar.append(part);
  cell.append(bar, percent(value));
  return cell;
}

export function percent(score) {
  return `${(100 * score).toFixed(score < 0.0995 ? 1 : 0)} %`;
}

export function neighbours(root, list, play) {
  root.replaceChildren(...list.map((one) => {
    const row = element("li"), words = element("div");
    const button = element("button", "\u25b6\ufe0e", { type: "button", "aria-label": `Play ${one.name}` });
    button.addEventListener("click", () => play(one.number));
    words.append(element("div", one.name, { class: "path", dir: "auto" }));
    const times = element("small", draw.span(one.start, one.end));
    if (one.label) times.append(" \u00b7 ", element("bdi", one.label));
    words.append(times);
    row.append(button, words, element("small", one.similarity.toFixed(3), { title: "cosine similarity" }));
    return row;
  }));
}
