// Drawing on canvases, without requests or event listeners.

export function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

// Dark violet over red to pale yellow: lighter is always more.
const ANCHORS = [[8, 5, 20], [55, 16, 92], [130, 32, 112], [205, 62, 78], [247, 138, 60], [252, 240, 180]];
const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const at = (i / 255) * (ANCHORS.length - 1), low = Math.min(Math.floor(at), ANCHORS.length - 2);
  return ANCHORS[low].map((value, j) => Math.round(value + (at - low) * (ANCHORS[low + 1][j] - value)));
});

function image(canvas, width, height, pixel) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), made = context.createImageData(width, height);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) made.data.set(pixel(x, y), 4 * (y * width + x));
  context.putImageData(made, 0, 0);
}

// Column by column from the server, lowest bin first; here the lowest is at the bottom.
export function spectrogram(canvas, picture, seconds) {
  const values = bytes(picture.values), mels = picture.mels;
  image(canvas, picture.columns, mels, (x, y) => [...COLOURS[values[x * mels + mels - 1 - y]], 255]);
  canvas.style.left = `${(100 * picture.first) / seconds}%`;
  canvas.style.width = `${(100 * picture.columns * picture.seconds) / seconds}%`;
}

export function colours(canvas, embedding, seconds) {
  const values = bytes(embedding.colours), times = embedding.times, edges = cells(times, times, seconds);
  strip(canvas, (context, width, height) => {
    times.forEach((_, i) => {
      context.fillStyle = `rgb(${values[3 * i]} ${values[3 * i + 1]} ${values[3 * i + 2]})`;
      const x = (edges[i] / seconds) * width;
      context.fillRect(x, 0, (edges[i + 1] / seconds) * width - x + 0.5, height);
    });
  });
}

export function track(canvas, scores, starts, ends, seconds, colour) {
  const edges = cells(starts, ends, seconds);
  strip(canvas, (context, width, height) => {
    scores.forEach((score, i) => {
      const x = (edges[i] / seconds) * width;
      context.fillStyle = `rgb(${colour})`;
      context.fillRect(x, height * (1 - score), (edges[i + 1] / seconds) * width - x, height * score);
    });
  }, 100);
}

// Borders between neighbours: halfway between their middles, so that overlapping windows do not hide each other.
export function cells(starts, ends, seconds) {
  const middles = starts.map((start, i) => (start + ends[i]) / 2);
  return [0, ...middles.slice(1).map((middle, i) => (middle + middles[i]) / 2), seconds];
}

function strip(canvas, fill, height = 1) {
  canvas.width = 1600;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, height);
  fill(context, canvas.width, height);
}

// The spectrogram is darkened where the head does not look. head -1: the mean of all.
export function attention(canvas, found, head, seconds) {
  const values = bytes(found.values), bands = found.bands, count = found.times.length, each = count * bands;
  const sums = new Float32Array(each);
  found.peaks.forEach((peak, h) => {
    if (head === -1 || head === h) for (let i = 0; i < each; i++) sums[i] += (peak * values[h * each + i]) / 255;
  });
  const most = Math.max(...sums) || 1;
  image(canvas, count, bands, (x, y) => {
    const share = sums[x * bands + bands - 1 - y] / most;
    return [0, 0, 8, Math.round(205 * (1 - Math.sqrt(share)))];
  });
  canvas.style.left = `${(100 * Math.max(0, found.times[0] - found.column / 2)) / seconds}%`;
  canvas.style.width = `${(100 * count * found.column) / seconds}%`;
}

const STEPS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800];

export function timeAxis(element, seconds, width) {
  const step = STEPS.find((one) => seconds / one <= Math.max(2, width / 70)) || seconds;
  element.replaceChildren();
  for (let i = 0; i * step <= seconds * 1.0001; i++) {
    const mark = document.createElement("span"), at = i * step;
    mark.textContent = i ? clock(at, step < 0.1 ? 2 : step < 1 ? 1 : 0) : "0 s";
    mark.style.left = `${(100 * at) / seconds}%`;
    if (at > 0.96 * seconds) mark.className = "end";
    element.append(mark);
  }
}

export function hertzAxis(element, hz, height) {
  element.replaceChildren();
  let last = -1;
  for (const value of [100, 250, 500, 1000, 2000, 4000, 8000, 16000]) {
    const above = hz.findIndex((one) => one >= value);
    if (above < 1 && value > hz[0]) continue;
    const part = above < 1 ? 0 : above - 1 + (value - hz[above - 1]) / (hz[above] - hz[above - 1]);
    const at = (100 * (part + 0.5)) / hz.length;
    if (above < 0 || at - last < 1600 / height || at > 97) continue;
    last = at;
    const mark = document.createElement("span");
    mark.textContent = value < 1000 ? `${value} Hz` : `${value / 1000} kHz`;
    mark.style.bottom = `${at}%`;
    element.append(mark);
  }
}

// 75.3 -> "1:15.3"; below a minute "15.3 s".
export function clock(seconds, digits = 1) {
  const rounded = Number(seconds.toFixed(digits));
  if (rounded < 60) return `${rounded.toFixed(digits)} s`;
  const minutes = Math.floor(rounded / 60), rest = (rounded - 60 * minutes).toFixed(digits);
  return `${minutes}:${rest.padStart(digits ? 3 + digits : 2, "0")}`;
}

export function span(start, end) {
  const begin = clock(start), close = clock(end);
  return begin.endsWith(" s") && close.endsWith(" s") ? `${begin.slice(0, -2)}\u2013${close}` : `${begin} \u2013 ${close}`;
}
