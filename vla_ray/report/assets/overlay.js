// Maps in the browser: their data, which comes as scripts; their numbers; and how they are coloured over a picture.
"use strict";

const Overlay = (() => {
  const { make, number } = Shared;

  // Data ------------------------------------------------------------------------------------------------------

  const keyOf = (choice) => `${choice.target}\n${choice.method}`;

  // Map data comes as scripts, which a page from disk may load; only the last few stay in memory.
  const Chunks = {
    KEEP: 4,
    kept: new Map(),
    waiting: new Map(),

    load(n) {
      if (this.kept.has(n)) {
        const chunk = this.kept.get(n);
        this.kept.delete(n); // to the end: last used
        this.kept.set(n, chunk);
        return Promise.resolve(chunk);
      }
      if (!this.waiting.has(n)) {
        const script = make("script", { src: `data/${n}.js` });
        const loaded = new Promise((resolve, reject) => {
          const missing = () => reject(new Error(`data/${n}.js cannot be read: keep a report's folders beside its index.html`));
          script.onload = () => (this.kept.has(n) ? resolve(this.kept.get(n)) : missing());
          script.onerror = missing;
        }).finally(() => {
          script.remove();
          this.waiting.delete(n);
        });
        this.waiting.set(n, loaded);
        document.head.append(script);
      }
      return this.waiting.get(n);
    },

    arrived(n, details) {
      this.kept.set(n, details);
      for (const old of this.kept.keys()) if (this.kept.size > this.KEEP) this.kept.delete(old);
    },
  };
  window.vlaRayChunk = (n, details) => Chunks.arrived(n, details);

  // The numbers of a map, in units of relevance, decoded once.
  function valuesOf(map) {
    if (!map.values) {
      const bytes = Uint8Array.from(atob(map.data), (character) => character.charCodeAt(0));
      const signed = map.direction === "signed";
      const levels = signed ? new Int8Array(bytes.buffer) : bytes;
      map.values = Float32Array.from(levels, (level) => (level / (signed ? 127 : 255)) * map.peak);
    }
    return map.values;
  }

  // Colours ---------------------------------------------------------------------------------------------------

  let tables = {};
  function useColours(colours) {
    tables = Object.fromEntries(
      Object.entries(colours).map(([kind, data]) => [kind, Uint8Array.from(atob(data), (c) => c.charCodeAt(0))]),
    );
  }

  const CANVAS_WIDTH = 512; // values are interpolated to about this, then coloured: colours must not be mixed
  const SOLID_FROM = 0.55; // of the scale; below, a colour fades so that the picture shows where there is little

  // One pixel: value in units of the scale, -1 to 1.
  function colour(pixels, at, value, signed) {
    const strength = Math.min(1, Math.abs(value));
    const place = signed ? Math.round((Math.max(-1, Math.min(1, value)) * 0.5 + 0.5) * 255) : Math.round(strength * 255);
    const table = signed ? tables.diverging : tables.sequential;
    const t = Math.min(1, strength / SOLID_FROM);
    pixels[at] = table[3 * place];
    pixels[at + 1] = table[3 * place + 1];
    pixels[at + 2] = table[3 * place + 2];
    pixels[at + 3] = 255 * t * t * (3 - 2 * t);
  }

  // Where each of n pixels lies between m cells: cell centres, as in HeatMap.on_picture.
  function between(n, m) {
    return Array.from({ length: n }, (_, i) => {
      const x = Math.max(0, Math.min(m - 1, ((i + 0.5) * m) / n - 0.5));
      const low = Math.min(Math.floor(x), Math.max(0, m - 2));
      return { low, high: Math.min(low + 1, m - 1), share: x - low };
    });
  }

  function paint(canvas, map, scale) {
    const values = valuesOf(map);
    const times = Math.max(1, Math.round(CANVAS_WIDTH / map.columns));
    canvas.width = map.columns * times;
    canvas.height = map.rows * times;
    const image = new ImageData(canvas.width, canvas.height);
    const across = between(canvas.width, map.columns);
    const signed = map.direction === "signed";
    let at = 0;
    for (const y of between(canvas.height, map.rows)) {
      const top = y.low * map.columns;
      const bottom = y.high * map.columns;
      for (const x of across) {
        const above = values[top + x.low] * (1 - x.share) + values[top + x.high] * x.share;
        const below = values[bottom + x.low] * (1 - x.share) + values[bottom + x.high] * x.share;
        colour(image.data, at, (above * (1 - y.share) + below * y.share) / scale, signed);
        at += 4;
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function paintBar(canvas, signed) {
    const image = new ImageData(canvas.width, 1);
    for (let i = 0; i < canvas.width; i++) {
      const x = i / (canvas.width - 1);
      colour(image.data, 4 * i, signed ? 2 * x - 1 : x, signed);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  // A panel: an element with the parts .heat, .bar, .low, .high, .scale, .direction and .probe ------------------

  const DIRECTIONS = {
    positive: "what raises the value",
    negative: "what lowers the value",
    signed: "blue lowers the value, orange raises it",
    none: "how much, not in which direction",
  };

  const partOf = (panel, name) => panel.querySelector(`.${name}`);

  // Colours the map over the picture, with its legend. `of`: whose percentile the scale is. Returns what is shown.
  function show(panel, map, { scale, visible, opacity, of }) {
    const heat = partOf(panel, "heat");
    const shown = map && scale > 0 ? map : null;
    heat.hidden = !shown || !visible;
    heat.style.opacity = opacity / 100;
    heat.dataset.direction = map?.direction ?? "";
    panel.classList.toggle("without-map", !shown);
    if (!shown) return null;
    paint(heat, map, scale);
    const signed = map.direction === "signed";
    paintBar(partOf(panel, "bar"), signed);
    const top = number(scale, 3);
    partOf(panel, "low").textContent = signed ? `\u2212${top}` : "0";
    partOf(panel, "high").textContent = top;
    partOf(panel, "scale").title = `relevance; the scale is the 99th percentile of ${of}`;
    partOf(panel, "direction").textContent = DIRECTIONS[map.direction] ?? map.direction;
    panel.dataset.scale = scale;
    return shown;
  }

  // Says what lies under the pointer.
  function probe(panel, map, event) {
    if (!map) return;
    const box = partOf(panel, "heat").getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * map.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * map.rows);
    const inside = column >= 0 && row >= 0 && column < map.columns && row < map.rows;
    const value = inside ? valuesOf(map)[row * map.columns + column] : 0;
    const share = number((100 * Math.abs(value)) / map.mass, 2);
    partOf(panel, "probe").textContent = inside ? `here ${number(value, 3)}, ${share} % of the map` : "";
  }

  return { Chunks, keyOf, useColours, show, probe };
})();
