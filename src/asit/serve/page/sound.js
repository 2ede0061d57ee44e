// The microphone, to a WAV file: what browsers record by themselves (WebM) not every server can read.

export class Microphone {
  constructor(onLevel) {
    this.onLevel = onLevel;
    this.parts = [];
    this.samples = 0;
  }

  async start() {
    if (!navigator.mediaDevices || !window.AudioWorkletNode) {
      throw new Error("This browser gives its microphone only to pages at localhost or over https.");
    }
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    try {
      this.context = new AudioContext();
      await this.context.audioWorklet.addModule("/recorder.js");
      const node = new AudioWorkletNode(this.context, "recorder", { numberOfOutputs: 0 });
      node.port.onmessage = (event) => {
        this.parts.push(event.data);
        this.samples += event.data.length;
        let peak = 0;
        for (const value of event.data) peak = Math.max(peak, Math.abs(value));
        this.onLevel(peak, this.samples / this.context.sampleRate);
      };
      this.context.createMediaStreamSource(this.stream).connect(node);
      await this.context.resume();
    } catch (error) {
      this.release();
      throw error;
    }
  }

  stop() {
    const rate = this.context.sampleRate;
    this.release();
    return this.samples ? new File([wav(this.parts, this.samples, rate)], "recording.wav", { type: "audio/wav" }) : null;
  }

  release() {
    for (const track of this.stream.getTracks()) track.stop();
    if (this.context) this.context.close();
  }
}

// Plays one clip of the index at a time; each has a button that starts and stops it.
export class Clips {
  constructor(audio, fetchClip) {
    this.audio = audio;
    this.fetchClip = fetchClip; // number -> Blob
    this.button = null;
    this.turn = 0; // of the last click: what an earlier one fetched comes too late
    for (const name of ["play", "pause", "ended"]) audio.addEventListener(name, () => this.mark(!audio.paused));
  }

  async toggle(number, button) {
    if (this.button === button) {
      if (this.audio.paused && this.audio.src) await this.audio.play();
      else this.stop();
      return;
    }
    this.stop();
    const turn = ++this.turn;
    const sound = await this.fetchClip(number);
    if (turn !== this.turn) return;
    if (this.audio.src) URL.revokeObjectURL(this.audio.src);
    this.audio.src = URL.createObjectURL(sound);
    this.button = button;
    await this.audio.play();
  }

  stop() {
    this.turn++;
    this.audio.pause();
    this.mark(false);
    this.button = null;
  }

  mark(playing) {
    if (this.button) this.button.setAttribute("aria-pressed", String(playing));
  }
}

// Three seconds to try the page with: a rising chirp, a ring of two partials, then a burst of noise.
export function example(rate = 16000) {
  const samples = new Float32Array(3 * rate);
  let seed = 1;
  for (let i = 0; i < samples.length; i++) {
    const t = i / rate, part = Math.floor(t), u = t - part;
    seed = (16807 * seed) % 2147483647;
    const chirp = Math.sin(2 * Math.PI * (600 * u + 1500 * u * u)) * Math.sin(Math.PI * u);
    const ring = (Math.sin(2 * Math.PI * 880 * u) + 0.5 * Math.sin(2 * Math.PI * 2217 * u)) * Math.exp(-4 * u) / 1.5;
    const noise = (seed / 1073741823.5 - 1) * Math.exp(-6 * u);
    samples[i] = 0.5 * [chirp, ring, noise][part] * Math.min(1, 200 * u);
  }
  return new File([wav([samples], samples.length, rate)], "example.wav", { type: "audio/wav" });
}

// Mono 16-bit PCM with the 44 bytes of a RIFF header.
export function wav(parts, samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples, true);
  let at = 44;
  for (const part of parts) {
    for (const value of part) {
      view.setInt16(at, Math.round(32767 * Math.max(-1, Math.min(1, value))), true);
      at += 2;
    }
  }
  return view;
}
