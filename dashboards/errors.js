// The page of a run's errors. It holds all predictions and filters them itself; the kernel sends images and intervals.
// Text from the data enters the page through `textContent` and `value` only, so that markup in it stays text.

const NONE = '';
const DEFAULTS = {
  split: NONE,
  label: NONE,
  predicted: NONE,
  low: 0,
  high: 1,
  show: 'wrong',
  slice: NONE,
  finding: NONE,
  column: NONE,
  value: NONE,
  change: NONE,
  sort: 'confident',
  open: NONE,
  mode: NONE,
  at: 0,
  review: NONE,
  theme: NONE,
};
const SORTS = {
  confident: ['Most confident first', 'confidence', -1],
  unconfident: ['Least confident first', 'confidence', 1],
  label_score: ['Most doubtful label first', 'label_score', 1],
  path: ['By file name', NONE, 1],
};
const CHANGES = {
  better: 'only this run is right',
  worse: 'only the reference is right',
  differ: 'another answer',
  both: 'both wrong',
};
const TYPES = { f4: Float32Array, f8: Float64Array, i4: Int32Array, u4: Uint32Array, u1: Uint8Array };
const HELP = [
  ['← ↑ → ↓', 'move in the grid, or to the next image'],
  ['Enter', 'open the image'],
  ['Space', 'select the image'],
  ['m', 'mark the image as label error'],
  ['e', 'export CSV'],
  ['c / w / a', 'show correct, wrong or all'],
  ['r', 'reset the filters'],
  ['Esc', 'close, or clear the selection'],
  ['?', 'this help'],
];
const TILE = { width: 156, height: 208 };

const percent = (x, digits = 1) => (x == null || Number.isNaN(x) ? '–' : (100 * x).toFixed(digits) + ' %');
const count = (n) => n.toLocaleString('en');
const images = (n) => `${count(n)} image${n === 1 ? '' : 's'}`;
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const range = (e) => (e.low == null ? 'no interval' : `${percent(e.low)} … ${percent(e.high)}`);
const groups = (e) => (e.n_groups ? `, ${count(e.n_groups)} groups` : '');
const note = (e) => (e.n ? `${range(e)} · n = ${count(e.n)}${groups(e)}` : 'no images');
const points = (e) => `${e.value >= 0 ? '+' : '−'}${Math.abs(100 * e.value).toFixed(1)} points`;

function make(tag, name, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  for (const child of children) if (child != null && child !== false) node.append(child); // strings become text nodes
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text != null) node.textContent = text;
  return node;
}

function titled(node, text) {
  node.append(draw('title', {}, text));
  return node;
}

function button(text, hint, act, name = '') {
  const node = make('button', name, text);
  node.type = 'button';
  node.title = hint;
  node.addEventListener('click', act);
  return node;
}

function choice(name, options, act) {
  // options: [value, text]
  const select = make('select');
  fill(select, options);
  select.setAttribute('aria-label', name);
  select.addEventListener('change', () => act(select.value));
  const label = make('label', 'choice', make('span', '', name), select);
  label.dataset.name = name;
  return [label, select];
}

function fill(select, options) {
  // options: [value, text], or [value, text, name of a group]
  const groups = new Map();
  const nodes = [];
  for (const [value, text, group] of options) {
    const option = make('option', '', text);
    option.value = value;
    if (!group) nodes.push(option);
    else if (groups.has(group)) groups.get(group).append(option);
    else {
      const node = make('optgroup', '', option);
      node.label = group;
      groups.set(group, node);
      nodes.push(node);
    }
  }
  select.replaceChildren(...nodes);
}

class Data {
  // the predictions, by column
  constructor(page, buffer) {
    this.page = page;
    for (const [name, [type, offset, length]] of Object.entries(page.layout))
      this[name] = new TYPES[type](buffer.slice(offset, offset + length * TYPES[type].BYTES_PER_ELEMENT));
    this.n = page.paths.length;
    this.k = page.classes.length;
    this.index = new Map(page.paths.map((path, i) => [path, i]));
    this.rows = page.splits.map((_, s) => Int32Array.from(this.split.keys()).filter((i) => this.split[i] === s));
    this.slices = new Map(page.slices.map((slice) => [slice.key, slice]));
    this.columns = new Map(page.columns.map((column) => [column.name, column]));
  }
  probability(i, c) {
    // of a class; 0 beyond those that are sent
    const w = this.page.width;
    if (w === this.k) return this.probabilities[i * w + c];
    for (let j = 0; j < w; j++) if (this.ranked[i * w + j] === c) return this.probabilities[i * w + j];
    return 0;
  }
  likeliest(i, n) {
    // [class, probability], in order
    const w = this.page.width,
      found = [];
    for (let j = 0; j < w; j++) found.push([w === this.k ? j : this.ranked[i * w + j], this.probabilities[i * w + j]]);
    return found.sort((a, b) => b[1] - a[1]).slice(0, n);
  }
  inSlice(i, slice) {
    if (slice.label >= 0) return this.label[i] === slice.label;
    return ((this.members[slice.offset + (i >> 3)] >> (i & 7)) & 1) === 1;
  }
  columnText(i, column) {
    const v = this['column:' + column.name][i];
    return column.values ? (column.values[v] ?? NONE) : Number.isNaN(v) ? NONE : String(+v.toPrecision(6));
  }
  findings(i) {
    return this.page.findings.filter(
      (_, bit) => (this.findingBits[i * this.page.findingWords + (bit >> 5)] >>> (bit & 31)) & 1,
    );
  }
  change(i) {
    if (!this.referencePredicted || this.referencePredicted[i] < 0) return NONE;
    const right = this.correct[i],
      was = this.referencePredicted[i] === this.label[i];
    return right && !was ? 'better' : !right && was ? 'worse' : !right && !was ? 'both' : 'same';
  }
}

// A range of numbers as "low … high", of which one may be missing; null where the text is none.
function readRange(text) {
  const number = '[-+]?(?:\\d+\\.?\\d*|\\.\\d+)(?:e[-+]?\\d+)?';
  const found = new RegExp(`^\\s*(${number})?\\s*(?:…|\\.{2,3}|to|–|-)\\s*(${number})?\\s*$`, 'i').exec(text);
  if (!text.trim()) return '';
  return found && (found[1] || found[2]) ? `${found[1] ?? ''} … ${found[2] ?? ''}`.trim() : null;
}

// Frames of a notebook contain what is fixed, so it would not lie in the window: the top layer does.
function setOnTop(node, shown, again = false) {
  if (!node.showPopover || !node.isConnected) return;
  node.popover = 'manual';
  const open = node.matches(':popover-open');
  if (open && (!shown || again)) node.hidePopover();
  if (shown && (!open || again)) node.showPopover(); // again: above what was shown after it
}

class Page {
  constructor(model, el) {
    this.model = model;
    this.el = el;
    this.images = new Map(); // row -> blob address of the small image
    this.wanted = new Set();
    this.marked = new Set(); // selected rows
    this.asked = 0;
    this.focus = 0;
    this.sortTable = { key: 'recall', sign: 1 };
    this.load();
    model.on('msg:custom', (message, buffers) => this.receive(message, buffers));
    model.on('change:page', () => this.load());
    this.onHash = () => {
      this.readAddress();
      this.update();
    };
    this.onKey = (event) => this.key(event);
    this.keys = this.data.page.in_address ? document : el;
    this.keys.addEventListener('keydown', this.onKey);
    if (this.data.page.in_address) window.addEventListener('hashchange', this.onHash);
    this.send({ kind: 'hello', version: this.data.page.version });
  }

  close() {
    this.keys.removeEventListener('keydown', this.onKey);
    window.removeEventListener('hashchange', this.onHash);
    this.resize?.disconnect();
    for (const url of this.images.values()) URL.revokeObjectURL(url);
  }

  load() {
    const bytes = this.model.get('columns'),
      page = this.model.get('page');
    const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
    this.data = new Data(page, buffer);
    this.corrections = page.corrections;
    DEFAULTS.split = page.splits[0];
    DEFAULTS.at = page.review_below ?? 0;
    this.state = { ...DEFAULTS, show: page.has_errors ? 'wrong' : 'all' };
    this.initial = { ...this.state };
    this.readAddress();
    this.build();
    this.update();
  }

  // The address holds the state

  readAddress() {
    if (!this.data.page.in_address) return;
    const given = new URLSearchParams(location.hash.slice(1)),
      state = { ...this.initial };
    for (const [key, value] of given) {
      if (!(key in DEFAULTS)) continue;
      if (typeof DEFAULTS[key] === 'number') {
        if (Number.isFinite(+value)) state[key] = clamp(+value, 0, 1);
      } else state[key] = value;
    }
    const p = this.data.page,
      known = (value, options) => (options.includes(value) ? value : NONE);
    state.split = known(state.split, p.splits) || p.splits[0];
    for (const key of ['label', 'predicted']) state[key] = known(state[key], p.classes);
    state.show = known(state.show, ['all', 'correct', 'wrong']) || this.initial.show;
    state.sort = known(state.sort, Object.keys(SORTS)) || 'confident';
    state.slice = this.data.slices.has(state.slice) ? state.slice : NONE;
    state.finding = known(state.finding, p.findings);
    state.column = this.data.columns.has(state.column) ? state.column : NONE;
    if (state.column && !this.data.columns.get(state.column).values) state.value = readRange(state.value) ?? NONE;
    state.mode = known(state.mode, p.classes);
    state.change = known(state.change, Object.keys(CHANGES));
    state.open = this.data.index.has(state.open) ? state.open : NONE;
    if (state.low > state.high) [state.low, state.high] = [state.high, state.low];
    this.state = state;
  }

  writeAddress() {
    if (!this.data.page.in_address) return;
    const kept = Object.entries(this.state).filter(([key, value]) => value !== this.initial[key]);
    const hash = kept.length ? '#' + new URLSearchParams(kept.map(([k, v]) => [k, String(v)])) : '';
    if (hash !== location.hash) history.replaceState(null, '', location.pathname + location.search + hash);
  }

  set(changes) {
    Object.assign(this.state, changes);
    this.update();
  }

  toggle(changes) {
    // a second click on the same thing clears it
    const same = Object.entries(changes).every(([key, value]) => this.state[key] === value);
    this.set(same ? Object.fromEntries(Object.keys(changes).map((key) => [key, this.initial[key]])) : changes);
  }

  reset() {
    const { split, theme, mode, at, review } = this.state;
    this.set({ ...this.initial, split, theme, mode, at, review });
  }

  // What the filters select

  filter(...ignored) {
    // a test of a row
    const s = this.state,
      d = this.data,
      tests = [],
      use = (name) => !ignored.includes(name);
    const label = d.page.classes.indexOf(s.label),
      predicted = d.page.classes.indexOf(s.predicted);
    if (label >= 0 && use('label')) tests.push((i) => d.label[i] === label);
    if (predicted >= 0 && use('predicted')) tests.push((i) => d.predicted[i] === predicted);
    if ((s.low > 0 || s.high < 1) && use('confidence'))
      tests.push((i) => d.confidence[i] >= s.low - 1e-7 && d.confidence[i] <= s.high + 1e-7);
    if (s.show !== 'all' && use('show')) {
      const right = +(s.show === 'correct');
      tests.push((i) => d.correct[i] === right);
    }
    if (s.slice && use('slice')) {
      const slice = d.slices.get(s.slice);
      tests.push((i) => d.inSlice(i, slice));
    }
    if (s.finding) {
      const bit = d.page.findings.indexOf(s.finding),
        words = d.page.findingWords;
      tests.push((i) => (d.findingBits[i * words + (bit >> 5)] >>> (bit & 31)) & 1);
    }
    if (s.column && s.value !== NONE) tests.push(this.columnTest());
    if (s.change === 'differ')
      tests.push((i) => d.referencePredicted[i] >= 0 && d.referencePredicted[i] !== d.predicted[i]);
    else if (s.change && use('change')) tests.push((i) => d.change(i) === s.change);
    return (i) => {
      for (const test of tests) if (!test(i)) return false;
      return true;
    };
  }

  columnTest() {
    const { column: name, value } = this.state,
      column = this.data.columns.get(name),
      x = this.data['column:' + name];
    if (column.values) {
      const code = column.values.indexOf(value);
      return (i) => x[i] === code;
    }
    const [low, high] = value.split('…').map((v) => (v.trim() === '' ? NaN : +v));
    return (i) => !(x[i] < low) && !(x[i] > high) && !Number.isNaN(x[i]);
  }

  get rows() {
    return this.data.rows[this.data.page.splits.indexOf(this.state.split)];
  }

  select() {
    const d = this.data,
      [, column, sign] = SORTS[this.state.sort],
      found = this.rows.filter(this.filter());
    if (column) {
      // rows are in the order of their paths, and the sort is stable
      const x = d[column],
        last = (v) => (Number.isNaN(v) ? Infinity : sign * v);
      found.sort((a, b) => last(x[a]) - last(x[b]) || a - b);
    }
    return found;
  }

  update() {
    const began = performance.now();
    const found = this.select();
    if (found.length !== this.found?.length || found.some((i, at) => i !== this.found[at])) this.found = found;
    const opened = this.state.open ? this.found.indexOf(this.data.index.get(this.state.open)) : -1;
    if (opened >= 0) this.focus = opened;
    this.focus = clamp(this.focus, 0, Math.max(0, this.found.length - 1));
    this.showControls();
    this.showCards();
    this.showMatrix();
    this.showHistogram();
    this.showReliability();
    this.showThreshold();
    this.showComparison();
    this.showClasses();
    this.showSlices();
    this.showGrid();
    this.showDetail();
    this.writeAddress();
    this.measure();
    this.root.dataset.ms = (performance.now() - began).toFixed(1);
    this.root.dataset.found = this.found.length;
  }

  // The kernel's part: intervals and images

  send(message, callbacks, buffers) {
    try {
      this.model.send(message, callbacks, buffers);
    } catch {
      this.say('The kernel of this page has ended. Reload the page.');
    }
  }

  measure() {
    clearTimeout(this.later);
    this.later = setTimeout(() => {
      const t = this.state.at,
        d = this.data;
      const selection = this.rows.filter(this.filter('show'));
      const answered = this.state.mode ? selection.slice(0, 0) : this.rows.filter((i) => d.confidence[i] >= t);
      this.asked += 1;
      this.send({ kind: 'measure', id: this.asked }, undefined, [selection.buffer, answered.buffer]);
    }, 25);
  }

  receive(message, buffers) {
    if (message.kind === 'images') {
      message.rows.forEach((i, j) => {
        const image = buffers[j].byteLength
          ? URL.createObjectURL(new Blob([buffers[j]], { type: message.types[j] }))
          : NONE;
        this.images.set(i, image);
        this.wanted.delete(i);
        for (const tile of this.root.querySelectorAll(`[data-row="${i}"]`)) this.putImage(tile, image);
      });
      while (this.images.size > 3000) {
        const [oldest, url] = this.images.entries().next().value;
        if (url) URL.revokeObjectURL(url);
        this.images.delete(oldest);
      }
    } else if (message.kind === 'measured' && message.id === this.asked) {
      this.root.dataset.measured = message.id;
      this.showSelection(message.selection);
      this.parts.answered.textContent = this.state.mode
        ? ''
        : message.answered.n
          ? `accuracy of these ${percent(message.answered.value)} (${note(message.answered)})`
          : 'it answers no image';
    } else if (message.kind === 'detail') this.showPictures(message, buffers);
    else if (message.kind === 'corrections') {
      this.corrections = message.corrections;
      this.say(message.said);
      this.showGrid(true);
      this.showDetail();
    }
  }

  say(text) {
    this.parts.said.textContent = text;
    this.parts.said.hidden = !text;
    setOnTop(this.parts.said, Boolean(text), true);
  }

  // The parts of the page

  build() {
    this.control = {};
    const p = this.data.page,
      parts = (this.parts = {}),
      part = (name, ...children) => (parts[name] = make('div', name, ...children));
    const panel = (title, hint, ...children) =>
      make('section', 'panel', make('h2', '', title), hint && make('p', 'hint', hint), ...children);
    const root = (this.root = make('div', 'cvnb'));
    root.tabIndex = -1;
    root.dataset.lmSuppressShortcuts = 'true'; // JupyterLab
    const title = make('h1', '', p.reference ? `Errors of ${p.run} beside ${p.reference.name}` : `Errors of ${p.run}`);
    const tools = make(
      'div',
      'tools',
      p.in_address && button('Copy link', 'copy the address, which holds the filters', () => this.copyLink()),
      button('◐', 'dark or light', () => this.turnTheme(), 'icon theme'),
      button('?', 'keys (?)', () => this.help(), 'icon'),
    );
    const about = make('p', 'sub', p.about);
    about.title = p.root;
    const notes = p.notes.map((text) => make('p', 'warn', text));
    parts.said = make('div', 'said');
    parts.said.setAttribute('role', 'status');
    parts.said.hidden = true;
    const left = make(
      'div',
      'panels',
      panel(
        'Confusion matrix',
        (p.matrix.length < p.classes.length ? 'The classes with the most errors. ' : '') +
          'Rows are true classes. A click shows a cell’s images, another one shows all.',
        part('matrix'),
      ),
      panel('Confidence', 'Click a bar, or drag over several.', part('histogram')),
      panel(
        'Threshold and cost',
        [
          p.cost_words,
          p.review_words && `By validation images, ${p.review_words}.`,
          'A click on the plot moves the threshold and shows the images below it.',
        ]
          .filter(Boolean)
          .join(' '),
        this.thresholdControls(part),
        part('threshold'),
      ),
      panel('Classes', 'A click on a name shows its images; on a heading, it sorts.', part('classes')),
      panel(
        'Slices',
        `Marked ▼: more errors than chance explains. A click shows the images.${p.objective ? ` Grey: ${p.objective}, images.` : ''}`,
        part('slices'),
      ),
      panel('Reliability', 'Accuracy by confidence. Dashed: perfect calibration.', part('reliability')),
    );
    if (p.reference) left.prepend(panel(`Against ${p.reference.name}`, '', part('comparison')));
    if (p.robustness) {
      const said = [p.robustness.words, p.flip_words].filter(Boolean).join('. ');
      left.append(panel('Robustness', said, this.robustness()));
    }
    const right = make('div', 'gallery', this.gridBar(part), part('grid'));
    parts.grid.tabIndex = 0;
    parts.grid.setAttribute('aria-label', 'images');
    parts.grid.addEventListener('scroll', () => requestAnimationFrame(() => this.showTiles()));
    root.append(
      make('header', '', make('div', '', title, about, ...notes), tools),
      part('cards'),
      this.controls(),
      make('div', 'columns', left, right),
      parts.said,
      part('detail'),
    );
    this.el.replaceChildren(root);
    this.resize?.disconnect();
    this.resize = new ResizeObserver(() => {
      this.fitFrame();
      this.showTiles();
    });
    this.resize.observe(parts.grid);
    this.histogramDrag();
  }

  controls() {
    const p = this.data.page,
      c = this.control,
      bar = make('div', 'filters');
    const add = (key, name, options) => {
      const [label, select] = choice(name, options, (value) => this.set({ [key]: value }));
      c[key] = select;
      bar.append(label);
    };
    const all = [[NONE, 'all']],
      names = (values) => values.map((v) => [v, v]);
    if (p.splits.length > 1) add('split', 'Split', names(p.splits));
    add('label', 'True class', [...all, ...names(p.classes)]);
    add('predicted', 'Predicted', [...all, ...names(p.classes)]);
    add('show', 'Show', [
      ['all', 'all images'],
      ['wrong', 'errors'],
      ['correct', 'correct'],
    ]);
    for (const key of ['low', 'high']) {
      const input = (c[key] = make('input'));
      Object.assign(input, { type: 'number', min: 0, max: 100, step: 1 });
      input.setAttribute('aria-label', key === 'low' ? 'lowest confidence' : 'highest confidence');
      input.addEventListener('change', () => {
        const other = this.state[key === 'low' ? 'high' : 'low'],
          own = clamp(+input.value / 100, 0, 1);
        this.set({ low: Math.min(own, other), high: Math.max(own, other) });
      });
    }
    bar.append(make('label', 'choice', make('span', '', 'Confidence, %'), make('span', 'pair', c.low, '–', c.high)));
    const slices = p.slices.filter((s) => s.label < 0); // a class has a filter of its own
    if (slices.length)
      add('slice', 'Slice', [
        ...all,
        ...slices.map((s) => [s.key, s.name, (p.splits.length > 1 ? `${s.split} · ` : '') + s.kind]),
      ]);
    if (p.findings.length) add('finding', 'Audit finding', [...all, ...names(p.findings)]);
    if (p.columns.length) {
      const [label, select] = choice('Column', [...all, ...p.columns.map((x) => [x.name, x.name])], (name) =>
        this.set({ column: name, value: NONE }),
      );
      c.column = select;
      c.value = make('select');
      c.value.setAttribute('aria-label', 'value of the column');
      c.value.addEventListener('change', () => this.set({ value: c.value.value }));
      c.between = make('input');
      c.between.placeholder = 'from … to';
      c.between.setAttribute('aria-label', 'range of the column');
      c.between.addEventListener('change', () => {
        const value = readRange(c.between.value);
        if (value === null) this.say(`“${c.between.value}” is no range. Write 20 to 40, or 20 to, or to 40.`);
        else this.set({ value });
      });
      label.append(c.value, c.between);
      bar.append(label);
    }
    if (p.reference) add('change', 'Reference', [...all, ...Object.entries(CHANGES)]);
    bar.append(button('Reset', 'clear every filter (r)', () => this.reset(), 'reset'));
    return bar;
  }

  showControls() {
    const s = this.state,
      c = this.control;
    for (const key of ['split', 'label', 'predicted', 'show', 'slice', 'finding', 'column', 'change'])
      if (c[key]) {
        c[key].value = s[key];
        c[key].closest('.choice').classList.toggle('set', s[key] !== this.initial[key]);
      }
    c.low.value = Math.round(100 * s.low);
    c.high.value = Math.round(100 * s.high);
    c.low.closest('.choice').classList.toggle('set', s.low > 0 || s.high < 1);
    if (c.column) {
      const column = this.data.columns.get(s.column);
      c.value.hidden = !column?.values;
      c.between.hidden = !column || !!column.values;
      if (column?.values) fill(c.value, [[NONE, 'all'], ...column.values.map((v) => [v, v || '(empty)'])]);
      c.value.value = c.between.value = s.value;
      if (column && !column.values) c.between.title = `${column.low} … ${column.high}`;
    }
    this.root.dataset.theme = s.theme;
    this.fitFrame();
    this.control.sort.value = s.sort;
  }

  card(title, value, text, name = '') {
    const card = make('div', 'card ' + name, make('h3', '', title), make('strong', '', value), make('span', '', text));
    return card;
  }

  showCards() {
    const p = this.data.page,
      summary = p.summary[this.state.split],
      cards = [];
    const reference = p.comparison?.[this.state.split];
    for (const c of summary.cards)
      cards.push(this.card(c.title, c.text ?? percent(c.estimate.value), c.note ?? note(c.estimate)));
    const selection = this.rows.filter(this.filter('show')),
      d = this.data;
    let right = 0;
    for (const i of selection) right += d.correct[i];
    if (reference)
      cards.push(
        this.card(`The reference, ${this.state.split}`, percent(reference.value.value), note(reference.value)),
      );
    this.selectionCard = this.card(
      'Accuracy of the selection',
      selection.length ? percent(right / selection.length) : '–',
      selection.length ? `… · n = ${count(selection.length)}` : 'no images',
      'chosen',
    );
    cards.push(
      this.selectionCard,
      this.card(
        'Errors in the selection',
        count(selection.length - right),
        `of ${images(selection.length)}`,
        'chosen',
      ),
    );
    this.parts.cards.replaceChildren(...cards);
  }

  showSelection(e) {
    this.selectionCard.querySelector('span').textContent = note(e);
  }

  showMatrix() {
    const d = this.data,
      p = d.page,
      shown = p.matrix,
      m = shown.length,
      at = new Map(shown.map((c, i) => [c, i]));
    const counts = new Float64Array(m * m),
      totals = new Float64Array(m),
      keep = this.filter('label', 'predicted', 'show');
    for (const i of this.rows) {
      if (!keep(i)) continue;
      const a = at.get(d.label[i]),
        b = at.get(d.predicted[i]);
      if (a != null) totals[a] += 1;
      if (a != null && b != null) counts[a * m + b] += 1;
    }
    const names = shown.map((c) => p.classes[c]),
      named = m <= 40;
    const longest = named ? Math.max(...names.map((n) => Math.min(n.length, 16))) : 0;
    const side = named ? 14 + 6.3 * longest : 16,
      cell = clamp(Math.floor((560 - side) / m), 4, 46),
      size = cell * m;
    const svg = draw('svg', {
      viewBox: `0 0 ${side + size + 2} ${size + side + 2}`,
      width: side + size + 2,
      role: 'img',
    });
    svg.setAttribute('aria-label', 'confusion matrix');
    const most = Math.max(1, ...counts.filter((_, i) => Math.floor(i / m) !== i % m));
    svg.append(draw('rect', { x: side, y: 0, width: size, height: size, class: 'ground' }));
    for (let a = 0; a < m; a++)
      for (let b = 0; b < m; b++) {
        const n = counts[a * m + b];
        if (!n) continue;
        const share = a === b ? n / Math.max(1, totals[a]) : 0.25 + (0.75 * n) / most;
        const attributes = {
          x: side + b * cell + 0.5,
          y: a * cell + 0.5,
          width: cell - 1,
          height: cell - 1,
          class: a === b ? 'right' : 'wrong',
          'fill-opacity': (a === b ? 0.15 + 0.35 * share : share).toFixed(3),
        };
        svg.append(draw('rect', attributes));
        if (m <= 20)
          svg.append(
            draw(
              'text',
              { x: side + (b + 0.5) * cell, y: (a + 0.5) * cell, class: a !== b && share > 0.6 ? 'value on' : 'value' },
              count(n),
            ),
          );
      }
    const short = (name) => (name.length > 16 ? name.slice(0, 15) + '…' : name);
    if (named)
      names.forEach((name, i) => {
        svg.append(titled(draw('text', { x: side - 6, y: (i + 0.5) * cell, class: 'row' }, short(name)), name));
        const x = side + (i + 0.5) * cell,
          y = size + 8;
        svg.append(
          titled(draw('text', { x, y, class: 'column', transform: `rotate(-90 ${x} ${y})` }, short(name)), name),
        );
      });
    const { label, predicted } = this.state,
      a = names.indexOf(label),
      b = names.indexOf(predicted);
    if (a >= 0 || b >= 0)
      svg.append(
        draw('rect', {
          class: 'chosen',
          x: side + Math.max(b, 0) * cell,
          y: Math.max(a, 0) * cell,
          width: b >= 0 ? cell : size,
          height: a >= 0 ? cell : size,
        }),
      );
    const hit = draw('rect', { class: 'hit', x: side, y: 0, width: size, height: size });
    const where = (event) => {
      const box = hit.getBoundingClientRect(),
        of = (v, low, length) => clamp(Math.floor(((v - low) / length) * m), 0, m - 1);
      return [of(event.clientY, box.top, box.height), of(event.clientX, box.left, box.width)];
    };
    const tip = draw('title');
    hit.append(tip);
    hit.addEventListener('mousemove', (event) => {
      const [r, c] = where(event);
      tip.textContent = `${count(counts[r * m + c])} of ${images(totals[r])}\ntrue: ${names[r]}\npredicted: ${names[c]}`;
    });
    hit.addEventListener('click', (event) => {
      const [r, c] = where(event),
        s = this.state;
      if (s.label === names[r] && s.predicted === names[c]) return this.set({ label: NONE, predicted: NONE });
      const hidden = s.show === (r === c ? 'wrong' : 'correct');
      this.set({ label: names[r], predicted: names[c], show: hidden ? 'all' : s.show });
    });
    svg.append(hit);
    this.parts.matrix.replaceChildren(svg);
  }

  showHistogram() {
    const d = this.data,
      bins = 25,
      right = new Float64Array(bins),
      wrong = new Float64Array(bins);
    const keep = this.filter('confidence', 'show'),
      width = 560,
      height = 120;
    for (const i of this.rows)
      if (keep(i)) (d.correct[i] ? right : wrong)[Math.min(bins - 1, Math.floor(d.confidence[i] * bins))] += 1;
    const root = (x) => Math.sqrt(x),
      most = root(Math.max(1, ...right.map((r, b) => r + wrong[b])));
    const svg = draw('svg', {
      viewBox: `0 0 ${width} ${height + 18}`,
      role: 'img',
      'aria-label': 'histogram of confidence',
    });
    const step = width / bins,
      { low, high } = this.state;
    for (let b = 0; b < bins; b++) {
      const all = right[b] + wrong[b],
        tall = all ? Math.max(2, (height * root(all)) / most) : 0,
        bad = all ? (tall * wrong[b]) / all : 0;
      const on = (b + 1) / bins > low + 1e-9 && b / bins < high - 1e-9;
      const group = draw('g', { class: on ? 'bin' : 'bin off' });
      const bar = (y, h, name) => draw('rect', { x: b * step + 1, y, width: step - 2, height: h, class: name });
      group.append(bar(height - tall, tall - bad, 'right'), bar(height - bad, bad, 'wrong'), bar(0, height, 'hit'));
      svg.append(
        titled(
          group,
          `${(b * 100) / bins}–${((b + 1) * 100) / bins} %: ${count(right[b])} correct, ${count(wrong[b])} wrong`,
        ),
      );
    }
    for (let t = 0; t <= 10; t += 2)
      svg.append(
        draw('text', { x: clamp((t / 10) * width, 12, width - 16), y: height + 14, class: 'tick' }, t * 10 + ' %'),
      );
    this.parts.histogram.replaceChildren(
      svg,
      make(
        'p',
        'hint key',
        make('i', 'right'),
        'correct',
        make('i', 'wrong'),
        'wrong · heights are square roots of counts',
      ),
    );
  }

  histogramDrag() {
    const panel = this.parts.histogram,
      bins = 25;
    const bin = (event) => {
      const box = panel.querySelector('svg').getBoundingClientRect();
      return clamp(Math.floor(((event.clientX - box.left) / box.width) * bins), 0, bins - 1);
    };
    let from = null;
    panel.onpointerdown = (event) => {
      if (event.target.closest('svg')) from = bin(event);
    };
    panel.onpointerup = (event) => {
      if (from == null) return;
      const [a, b] = [from, bin(event)].sort((x, y) => x - y);
      from = null;
      this.toggle({ low: a / bins, high: (b + 1) / bins });
    };
  }

  showReliability() {
    const bins = this.data.page.summary[this.state.split].calibration,
      w = 560,
      h = 190;
    const svg = draw('svg', { viewBox: `0 0 ${w + 40} ${h + 34}`, role: 'img', 'aria-label': 'reliability' });
    const x = (v) => 36 + v * (w - 8),
      y = (v) => 6 + (1 - v) * h;
    this.axes(svg, x, y, 'confidence');
    svg.append(draw('line', { x1: x(0), y1: y(0), x2: x(1), y2: y(1), class: 'dashed' }));
    svg.append(
      draw('polyline', { points: bins.map((b) => `${x(b.confidence)},${y(b.accuracy)}`).join(' '), class: 'line' }),
    );
    for (const b of bins) {
      if (b.low != null)
        svg.append(
          draw('line', { x1: x(b.confidence), x2: x(b.confidence), y1: y(b.low), y2: y(b.high), class: 'whisker' }),
        );
      const dot = draw('circle', { cx: x(b.confidence), cy: y(b.accuracy), r: 5, class: 'dot' });
      dot.addEventListener('click', () => this.toggle({ low: b.from, high: b.to, show: 'all' }));
      svg.append(titled(dot, `confidence ${percent(b.confidence)}, accuracy ${percent(b.accuracy)} (${note(b)})`));
    }
    this.parts.reliability.replaceChildren(
      make('p', 'hint', this.data.page.summary[this.state.split].calibration_words),
      svg,
    );
  }

  axes(svg, x, y, name) {
    for (let t = 0; t <= 10; t += 2) {
      const v = t / 10;
      svg.append(
        draw('line', { x1: x(0), x2: x(1), y1: y(v), y2: y(v), class: 'rule' }),
        draw('text', { x: x(0) - 6, y: y(v), class: 'row tick' }, String(t * 10)),
        draw('text', { x: x(v), y: y(0) + 14, class: 'tick' }, t * 10 + ' %'),
      );
    }
    svg.append(draw('text', { x: x(0.5), y: y(0) + 27, class: 'tick' }, name));
  }

  // The threshold

  thresholdControls(part) {
    const p = this.data.page,
      c = (this.threshold = {});
    const modes = [[NONE, 'a person looks below'], ...p.classes.map((name) => [name, `${name} is answered from`])];
    const [label, mode] = choice('Rule', modes, (value) => this.set({ mode: value }));
    c.mode = mode;
    c.slider = make('input');
    Object.assign(c.slider, { type: 'range', min: 0, max: 1, step: 0.01 });
    c.slider.setAttribute('aria-label', 'threshold');
    c.slider.addEventListener('input', () => this.setThreshold(+c.slider.value));
    c.readout = make('output', '');
    c.review = make('input');
    Object.assign(c.review, { type: 'number', min: 0, step: 'any' });
    c.review.setAttribute('aria-label', 'cost of a look');
    c.review.addEventListener('change', () => this.set({ review: c.review.value }));
    c.reviewLabel = make('label', 'choice', make('span', '', 'Cost of a look'), c.review);
    part('answered');
    return make(
      'div',
      'threshold-bar',
      label,
      make('label', 'choice wide', make('span', '', 'Threshold'), make('span', 'pair', c.slider, c.readout)),
      c.reviewLabel,
    );
  }

  setThreshold(t) {
    // moves nothing but its own panel
    this.state.at = t;
    this.showThreshold();
    this.writeAddress();
    this.measure();
  }

  get reviewCost() {
    const given = parseFloat(this.state.review);
    return Number.isFinite(given) && given >= 0 ? given : this.data.page.review_cost;
  }

  cost(label, predicted) {
    const costs = this.data.page.costs;
    return costs ? costs[label][predicted] : +(label !== predicted);
  }

  curves() {
    // for 101 thresholds
    const d = this.data,
      mode = d.page.classes.indexOf(this.state.mode),
      rows = this.rows,
      steps = 101;
    const make = () => new Float64Array(steps + 1),
      change = { cost: make(), answered: make(), errors: make(), hits: make() };
    const step = (v) => clamp(Math.floor(v * 100 + 1e-6), 0, 100),
      base = { cost: 0, errors: 0, hits: 0, answered: 0 };
    let own = 0;
    for (const i of rows) {
      // what an image adds up to its own threshold, and beyond it
      let p, under, over;
      if (mode < 0) {
        p = d.confidence[i];
        under = { cost: this.cost(d.label[i], d.predicted[i]), errors: 1 - d.correct[i], answered: 1, hits: 0 };
        over = { cost: this.reviewCost, errors: 0, answered: 0, hits: 0 };
      } else {
        p = d.probability(i, mode);
        const is = +(d.label[i] === mode),
          other = this.other(i, mode);
        own += is;
        under = { cost: this.cost(d.label[i], mode), errors: 1 - is, answered: 1, hits: is };
        over = { cost: this.cost(d.label[i], other), errors: +(d.label[i] !== other), answered: 0, hits: 0 };
      }
      const at = step(p) + 1;
      for (const key in base) {
        base[key] += under[key];
        change[key][at] += over[key] - under[key];
      }
    }
    const found = { cost: [], errors: [], answered: [], hits: [], own, n: rows.length };
    for (let t = 0; t < steps; t++)
      for (const key in base) {
        base[key] += change[key][t];
        found[key].push(base[key]);
      }
    return found;
  }

  other(i, mode) {
    // the answer without a class
    if (this.data.predicted[i] !== mode) return this.data.predicted[i];
    return (this.data.likeliest(i, 2).find(([c]) => c !== mode) ?? [mode])[0];
  }

  showThreshold() {
    const c = this.threshold,
      s = this.state,
      key = `${s.split}|${s.mode}|${this.reviewCost}`;
    if (this.curvesKey !== key || this.curvesOf !== this.data) {
      this.found_curves = this.curves();
      this.curvesKey = key;
      this.curvesOf = this.data;
    }
    const f = this.found_curves,
      t = clamp(Math.round(100 * s.at), 0, 100),
      n = Math.max(1, f.n),
      cost = (v) => +(v / n).toPrecision(3);
    c.mode.value = s.mode;
    c.slider.value = s.at;
    c.readout.textContent = percent(s.at, Math.abs(100 * s.at - t) > 0.01 ? 1 : 0);
    c.review.value = this.reviewCost;
    c.reviewLabel.hidden = !!s.mode;
    let cheapest = 0;
    f.cost.forEach((v, i) => {
      if (v < f.cost[cheapest] - 1e-9) cheapest = i;
    });
    const alone = s.mode ? [] : this.rows.filter((i) => this.data.confidence[i] >= s.at),
      left = alone.filter((i) => !this.data.correct[i]).length;
    const words = s.mode
      ? `${count(f.answered[t])} images are answered ${s.mode}: precision ${percent(f.hits[t] / f.answered[t])}, recall ${percent(f.hits[t] / f.own)}.`
      : `The model answers ${percent(alone.length / n)} of ${count(f.n)} images ` +
        `and a person ${count(f.n - alone.length)}; ${count(left)} errors are left.`;
    const line = `Cost of an image ${cost(f.cost[t])}; the least, ${cost(f.cost[cheapest])}, at ${cheapest} % (chosen on these images, so it flatters).`;
    const go = button('go there', 'set the cheapest threshold', () => this.setThreshold(cheapest / 100), 'link');
    const w = 560,
      h = 130,
      svg = draw('svg', { viewBox: `0 0 ${w + 40} ${h + 34}`, role: 'img', 'aria-label': 'cost by threshold' });
    const x = (v) => 36 + v * (w - 8),
      y = (v) => 6 + (1 - v) * h,
      most = Math.max(1e-9, ...f.cost);
    this.axes(svg, x, y, 'threshold');
    const curve = (values, name) =>
      svg.append(
        draw('polyline', { class: name, points: values.map((v, i) => `${x(i / 100)},${y(clamp(v, 0, 1))}`).join(' ') }),
      );
    curve(
      f.cost.map((v) => v / most),
      'line cost',
    );
    const risk = f.errors.map((v, i) => (f.answered[i] ? v / f.answered[i] : 0));
    if (s.mode) {
      curve(
        f.hits.map((v, i) => (f.answered[i] ? v / f.answered[i] : 1)),
        'line',
      );
      curve(
        f.hits.map((v) => v / Math.max(1, f.own)),
        'line second',
      );
    } else {
      curve(
        f.answered.map((v) => v / n),
        'line',
      );
      curve(risk, 'line second');
    }
    svg.append(draw('line', { x1: x(s.at), x2: x(s.at), y1: y(0), y2: y(1), class: 'now' }));
    svg.addEventListener('click', (event) => {
      const box = svg.getBoundingClientRect(),
        v = (((event.clientX - box.left) / box.width) * (w + 40) - 36) / (w - 8);
      const at = clamp(Math.round(100 * v) / 100, 0, 1);
      this.set(s.mode ? { at } : { at, low: 0, high: at, show: 'all' }); // the images that a person looks at
    });
    const names = s.mode ? ['precision', 'recall'] : ['share answered', 'errors among the answered'];
    const legend = make(
      'p',
      'hint key',
      make('i', 'line'),
      names[0],
      make('i', 'line second'),
      names[1],
      make('i', 'line cost'),
      `cost ÷ ${cost(most)}`,
    );
    this.parts.threshold.replaceChildren(
      make('p', '', words + ' ', this.parts.answered),
      make('p', '', line + ' ', go),
      svg,
      legend,
    );
  }

  // Tables

  showClasses() {
    const p = this.data.page,
      split = this.state.split,
      { key, sign } = this.sortTable;
    const rows = p.summary[split].per_class.map((row) => ({ ...row, gain: p.comparison?.[split]?.classes[row.label] }));
    const columns = [
      ['label', 'class'],
      ['n', 'images'],
      ['recall', 'recall'],
      ['precision', 'precision'],
      ['f1', 'F1'],
    ];
    if (p.reference) columns.push(['gain', 'recall gained']);
    if (this.classesOf !== `${split}|${key}|${sign}` || this.classesData !== this.data) {
      this.classesOf = `${split}|${key}|${sign}`;
      this.classesData = this.data;
      const last = (v) => (v == null ? Infinity : sign * v);
      rows.sort((a, b) =>
        key === 'label' ? sign * a.label.localeCompare(b.label, 'en', { numeric: true }) : last(a[key]) - last(b[key]),
      );
      const head = make(
        'tr',
        '',
        ...columns.map(([name, text]) => {
          const cell = make(
            'th',
            '',
            button(
              text + (name === key ? (sign > 0 ? ' ▲' : ' ▼') : ''),
              'sort',
              () => {
                this.sortTable = { key: name, sign: name === key ? -sign : 1 };
                this.showClasses();
              },
              'link',
            ),
          );
          cell.setAttribute('aria-sort', name !== key ? 'none' : sign > 0 ? 'ascending' : 'descending');
          return cell;
        }),
      );
      const share = (row, name) =>
        make(
          'td',
          'number',
          percent(row[name]),
          row[name + '_low'] != null
            ? make('small', '', ` ${percent(row[name + '_low'], 0)}…${percent(row[name + '_high'], 0)}`)
            : null,
        );
      const body = rows.map((row) => {
        const line = make(
          'tr',
          '',
          make(
            'td',
            'name',
            button(row.label, 'show its images', () => this.toggle({ label: row.label }), 'link'),
          ),
          make('td', 'number', count(row.n)),
          share(row, 'recall'),
          share(row, 'precision'),
          share(row, 'f1'),
        );
        if (p.reference) line.append(make('td', 'number', row.gain == null ? '–' : points({ value: row.gain })));
        if (!row.n) line.classList.add('soft');
        line.dataset.label = row.label;
        return line;
      });
      this.parts.classes.replaceChildren(make('table', '', make('thead', '', head), make('tbody', '', ...body)));
    }
    for (const line of this.parts.classes.querySelectorAll('tbody tr'))
      line.classList.toggle('chosen', line.dataset.label === this.state.label);
  }

  showSlices() {
    const p = this.data.page,
      slices = p.slices
        .filter((s) => s.split === this.state.split && s.kind !== 'robustness') // its panel has these
        .slice(0, 60);
    if (!slices.length) return this.parts.slices.replaceChildren(make('p', 'hint', 'There are no slices.'));
    const lowest = Math.min(...slices.map((s) => s.low ?? 1)),
      place = (v) => (100 * (v - lowest)) / Math.max(1e-9, 1 - lowest) + '%';
    this.parts.slices.replaceChildren(
      ...slices.map((s) => {
        const bar = make('span', 'track'),
          whisker = make('i', 'whisker'),
          dot = make('i', 'dot');
        whisker.style.left = place(s.low);
        whisker.style.width = `calc(${place(s.high)} - ${place(s.low)})`;
        dot.style.left = place(s.accuracy);
        bar.append(whisker, dot);
        const text = `${s.kind}: ${s.name}`;
        const by = p.comparison?.[s.split]?.slices[s.key],
          gain = by != null ? ` · ${points({ value: by })} against the reference` : '';
        const figure = { value: s.objective, low: s.objective_low, high: s.objective_high, n: s.n };
        const by_objective =
          p.objective && s.objective != null ? `\n${p.objective} ${percent(s.objective)} (${note(figure)})` : '';
        const line = button(
          '',
          `${text}\naccuracy ${percent(s.accuracy)} (${note(s)})${by_objective}${gain}`,
          () => this.toggle({ slice: s.key, show: 'all' }),
          'slice' + (s.below ? ' below' : ''),
        );
        line.append(
          make('span', 'mark', s.below ? '▼' : ''),
          make('span', 'name', text),
          bar,
          make('span', 'number', percent(s.accuracy)),
          make(
            'small',
            '',
            p.objective && s.objective != null ? `${percent(s.objective)} · ${count(s.n)}` : `n = ${count(s.n)}`,
          ),
        );
        line.classList.toggle('chosen', s.key === this.state.slice);
        line.dataset.slice = s.key;
        return line;
      }),
    );
  }

  showComparison() {
    if (!this.data.page.reference) return;
    const c = this.data.page.comparison[this.state.split];
    if (!c)
      return this.parts.comparison.replaceChildren(make('p', '', 'The runs have no image of this split in common.'));
    this.parts.comparison.replaceChildren(
      ...c.lines.map((line) => make('p', '', line)),
      ...c.counts.map(([key, text, n]) =>
        button(`${count(n)} ${text}`, 'show them', () => this.toggle({ change: key, show: 'all' })),
      ),
    );
  }

  robustness() {
    const r = this.data.page.robustness,
      w = 560,
      h = 150;
    const svg = draw('svg', { viewBox: `0 0 ${w + 40} ${h + 110}`, role: 'img', 'aria-label': 'robustness' });
    const strengths = [...new Set(r.rows.map((row) => row.strength))];
    const names = [...new Set(r.rows.map((row) => row.change))],
      x = (i) => 40 + ((i + 0.5) * (w - 10)) / names.length,
      y = (v) => 6 + (1 - v) * h;
    for (let t = 0; t <= 10; t += 2)
      svg.append(
        draw('line', { x1: 36, x2: 36 + w, y1: y(t / 10), y2: y(t / 10), class: 'rule' }),
        draw('text', { x: 30, y: y(t / 10), class: 'row tick' }, String(t * 10)),
      );
    svg.append(draw('line', { x1: 36, x2: 36 + w, y1: y(r.clean.value), y2: y(r.clean.value), class: 'dashed' }));
    for (const row of r.rows) {
      const weak = row.proven ?? row.weak; // an earlier version judged the medium strength alone
      const px = x(names.indexOf(row.change)) + (strengths.indexOf(row.strength) - (strengths.length - 1) / 2) * 8;
      svg.append(
        draw('line', { x1: px, x2: px, y1: y(row.low), y2: y(row.high), class: weak ? 'whisker wrong' : 'whisker' }),
      );
      const name = `${row.change}, strength ${row.strength}`,
        slice = this.data.slices.get(`${r.split}/robustness/${name}`);
      const dot = titled(
        draw('circle', { cx: px, cy: y(row.value), r: 3.5, class: weak ? 'dot wrong' : 'dot' }),
        `${name}: ${percent(row.value)} (${note(row)})${slice ? '; a click shows the images that it costs' : ''}`,
      );
      if (slice) {
        dot.dataset.slice = slice.key;
        dot.addEventListener('click', () => this.toggle({ slice: slice.key, show: 'all' }));
      }
      svg.append(dot);
    }
    names.forEach((name, i) =>
      svg.append(
        draw('text', { x: x(i), y: h + 14, class: 'column', transform: `rotate(-60 ${x(i)} ${h + 14})` }, name),
      ),
    );
    return svg;
  }

  // The grid

  gridBar(part) {
    const p = this.data.page,
      c = this.control;
    const orders = Object.entries(SORTS).filter(([, [, column]]) => column !== 'label_score' || p.has_label_scores);
    const [label, select] = choice(
      'Order',
      orders.map(([key, [text]]) => [key, text]),
      (value) => this.set({ sort: value }),
    );
    c.sort = select;
    const mark = p.can_mark
      ? button(
          'Mark as label error…',
          'write corrections of the selected images (m)',
          () => this.markSelected(),
          'mark-button',
        )
      : null;
    return make(
      'div',
      'grid-bar',
      part('title'),
      label,
      button('Export CSV', 'the selected images, or all that are shown (e)', () => this.exportCsv()),
      mark,
      part('marking'),
    );
  }

  showGrid(keep = false) {
    const n = this.found.length,
      words = { all: 'images', correct: 'correct predictions', wrong: 'errors' }[this.state.show],
      what = n === 1 ? words.slice(0, -1) : words;
    const hidden = this.marked.size && this.marked.size - this.found.reduce((k, i) => k + this.marked.has(i), 0);
    const chosen = this.marked.size ? ` · ${count(this.marked.size)} selected` : '';
    const unseen = hidden ? `, ${count(hidden)} of them outside of these filters (Esc clears)` : '';
    const title = make('h2', '', make('span', 'count', count(n)), ' ' + what, make('span', 'soft', chosen + unseen));
    this.parts.title.replaceChildren(title);
    const grid = this.parts.grid;
    const top = keep || this.gridOf === this.found ? grid.scrollTop : 0;
    this.gridOf = this.found;
    this.tiles = new Map();
    this.sheet = make('div', 'sheet');
    grid.replaceChildren(n ? this.sheet : make('p', 'empty', 'No image fits these filters.'));
    if (n && this.across) this.sheet.style.height = Math.ceil(n / this.across) * TILE.height + 'px';
    grid.scrollTop = top;
    this.showTiles();
  }

  showTiles() {
    const grid = this.parts.grid,
      n = this.found?.length;
    if (!n || !grid.isConnected) return;
    const across = (this.across = Math.max(1, Math.floor((grid.clientWidth - 4) / TILE.width))),
      step = grid.clientWidth / across;
    this.sheet.style.height = Math.ceil(n / across) * TILE.height + 'px';
    const first = Math.max(0, Math.floor(grid.scrollTop / TILE.height) - 1) * across;
    const last = Math.min(n, (Math.ceil((grid.scrollTop + (grid.clientHeight || 600)) / TILE.height) + 1) * across);
    for (const [at, tile] of this.tiles)
      if (at < first || at >= last) {
        tile.remove();
        this.tiles.delete(at);
      }
    const missing = [];
    for (let at = first; at < last; at++) {
      let tile = this.tiles.get(at);
      if (!tile) {
        tile = this.tile(at);
        this.tiles.set(at, tile);
        this.sheet.append(tile);
      }
      tile.style.transform = `translate(${(at % across) * step}px, ${Math.floor(at / across) * TILE.height}px)`;
      tile.style.width = step - 8 + 'px';
      tile.classList.toggle('focus', at === this.focus);
      const i = this.found[at];
      if (!this.images.has(i) && !this.wanted.has(i)) missing.push(i);
    }
    if (missing.length) this.request(missing);
  }

  request(rows) {
    for (const i of rows) this.wanted.add(i);
    this.send({ kind: 'images', rows: rows.map(Number) });
  }

  putImage(node, url) {
    const place = node.querySelector('.picture');
    if (!url) return place.replaceChildren(make('span', 'none', 'no image'));
    const image = make('img');
    image.src = url;
    image.alt = '';
    image.draggable = false;
    image.onload = () => image.classList.toggle('pixels', Math.max(image.naturalWidth, image.naturalHeight) <= 64);
    place.replaceChildren(image);
  }

  tile(at) {
    const i = this.found[at],
      d = this.data,
      p = d.page,
      right = !!d.correct[i];
    const tile = make('figure', `tile ${right ? 'right' : 'wrong'}`),
      caption = make('figcaption');
    const line = (mark, name, text, title) => {
      const row = make('span', 'line ' + name, make('b', '', mark), make('span', 'name', text));
      row.title = title;
      return row;
    };
    const label = p.classes[d.label[i]],
      predicted = p.classes[d.predicted[i]];
    caption.append(line(right ? '✓' : '✗', 'answer', predicted, `predicted: ${predicted}`));
    caption.lastChild.append(make('span', 'sure', percent(d.confidence[i])));
    caption.append(line('=', 'truth', label, `true: ${label}`));
    if (d.referencePredicted?.[i] >= 0) {
      const other = p.classes[d.referencePredicted[i]];
      caption.append(
        line(d.referencePredicted[i] === d.label[i] ? '✓' : '✗', 'reference', other, `reference: ${other}`),
      );
    }
    tile.append(make('div', 'picture'), caption);
    const correction = this.corrections[p.paths[i]];
    if (correction)
      tile.append(make('span', 'badge', correction.action === 'relabel' ? `→ ${correction.label}` : correction.action));
    tile.title = p.paths[i];
    tile.dataset.row = i;
    tile.classList.toggle('selected', this.marked.has(i));
    if (this.images.has(i)) this.putImage(tile, this.images.get(i));
    const check = make('input', 'check');
    check.type = 'checkbox';
    check.checked = this.marked.has(i);
    check.setAttribute('aria-label', 'select');
    check.addEventListener('click', (event) => {
      event.stopPropagation();
      this.pick(i);
    });
    tile.append(check);
    tile.addEventListener('click', () => {
      this.focus = at;
      this.open(i);
    });
    return tile;
  }

  pick(i) {
    this.marked.has(i) ? this.marked.delete(i) : this.marked.add(i);
    this.showGrid(true);
  }

  // One image

  open(i) {
    this.set({ open: this.data.page.paths[i] });
  }

  move(step) {
    const n = this.found.length;
    if (!n) return;
    this.focus = clamp(this.focus + step, 0, n - 1);
    const grid = this.parts.grid,
      top = Math.floor(this.focus / (this.across || 1)) * TILE.height;
    if (top < grid.scrollTop) grid.scrollTop = top;
    else if (top + TILE.height > grid.scrollTop + grid.clientHeight)
      grid.scrollTop = top + TILE.height - grid.clientHeight;
    this.showTiles();
    if (this.state.open) this.open(this.found[this.focus]);
  }

  showDetail() {
    const box = this.parts.detail,
      d = this.data,
      p = d.page,
      i = d.index.get(this.state.open);
    box.hidden = i == null;
    if (i == null) {
      setOnTop(box, false);
      box.replaceChildren();
      this.detailOf = null;
      return;
    }
    if (this.detailOf !== i) {
      this.detailOf = i;
      this.pictures = null;
      this.send({ kind: 'detail', row: i });
    }
    const right = !!d.correct[i],
      label = p.classes[d.label[i]],
      predicted = p.classes[d.predicted[i]];
    const bars = d.likeliest(i, 8).map(([c, v]) => {
      const bar = make('i');
      bar.style.width = `${100 * v}%`;
      const row = make(
        'div',
        'probability' + (c === d.label[i] ? ' truth' : '') + (c === d.predicted[i] ? ' answer' : ''),
        make('span', 'name', p.classes[c] + (c === d.label[i] ? ' (true)' : '')),
        make('span', 'track', bar),
        make('span', 'number', percent(v)),
      );
      return row;
    });
    const facts = [
      ['file', p.paths[i]],
      ['split', this.state.split],
      ['confidence', percent(d.confidence[i])],
    ];
    if (!Number.isNaN(d.label_score[i])) facts.push(['score of the label', d.label_score[i].toFixed(3)]);
    if (d.findings(i).length) facts.push(['audit findings', d.findings(i).join(', ')]);
    for (const column of p.columns) if (d.columnText(i, column)) facts.push([column.name, d.columnText(i, column)]);
    if (d.referencePredicted?.[i] >= 0)
      facts.push(['reference', `${p.classes[d.referencePredicted[i]]}, ${percent(d.referenceConfidence[i])}`]);
    const table = make(
      'table',
      'facts',
      ...facts.map(([name, value]) => make('tr', '', make('th', '', name), make('td', '', value))),
    );
    this.parts.large = make('div', 'large');
    this.parts.more = make('div', 'more');
    const head = make(
      'div',
      'head ' + (right ? 'right' : 'wrong'),
      make('strong', '', right ? `✓ ${label}` : `✗ ${predicted}`),
      right ? null : make('span', '', `true: ${label}`),
      make('span', 'space'),
      button('‹', 'previous (←)', () => this.move(-1), 'icon'),
      button('›', 'next (→)', () => this.move(1), 'icon'),
      button('✕', 'close (Esc)', () => this.set({ open: NONE }), 'icon'),
    );
    const card = make(
      'div',
      'sheet-card',
      head,
      make(
        'div',
        'body',
        make('div', '', this.parts.large, this.parts.more),
        make(
          'div',
          '',
          make('h3', '', 'Probabilities'),
          ...bars,
          make('h3', '', 'About the image'),
          table,
          p.can_mark ? this.marker([i]) : null,
        ),
      ),
    );
    card.setAttribute('role', 'dialog');
    card.setAttribute('aria-modal', 'true');
    card.setAttribute('aria-label', p.paths[i]);
    box.replaceChildren(card);
    box.onclick = (event) => {
      if (event.target === box) this.set({ open: NONE });
    };
    setOnTop(box, true);
    if (this.pictures) this.showPictures(...this.pictures);
  }

  showPictures(message, buffers) {
    if (message.row !== this.detailOf) return;
    this.pictures = [message, buffers];
    const picture = (at, type, name) => {
      if (!buffers[at].byteLength) return make('span', 'none', 'The image cannot be read.');
      const image = make('img', name),
        url = URL.createObjectURL(new Blob([buffers[at]], { type }));
      image.onload = () => {
        image.classList.toggle('pixels', Math.max(image.naturalWidth, image.naturalHeight) <= 64);
        URL.revokeObjectURL(url);
      };
      image.src = url;
      image.alt = '';
      return image;
    };
    this.parts.large.replaceChildren(picture(0, message.types[0], 'full'));
    const more = [];
    if (message.saliency)
      more.push(
        make('h3', '', 'What argues for the answer and against the label'),
        picture(message.saliency, message.types[message.saliency], 'saliency'),
      );
    else
      more.push(
        make('p', 'hint', 'No saliency: the errors stage makes it for the most confident errors (errors.n_images).'),
      );
    if (message.neighbors.length)
      more.push(
        make('h3', '', 'Nearest training images'),
        make(
          'div',
          'neighbors',
          ...message.neighbors.map((item) => {
            const figure = make(
              'figure',
              '',
              picture(item.buffer, message.types[item.buffer], ''),
              make('figcaption', '', item.label),
              make('small', '', item.similarity.toFixed(2)),
            );
            figure.title = item.path;
            return figure;
          }),
        ),
      );
    this.parts.more.replaceChildren(...more);
  }

  // Label errors

  marker(rows) {
    const p = this.data.page,
      box = make('div', 'marker', make('h3', '', 'Is the label wrong?')),
      first = rows[0];
    const given = this.corrections[p.paths[first]],
      guess = this.data.predicted[first];
    const [label, select] = choice(
      'It is',
      p.classes.map((name) => [name, name]),
      () => {},
    );
    select.value = given?.label || p.classes[guess];
    const send = (action, name = '') => this.send({ kind: 'mark', rows: rows.map(Number), action, label: name });
    box.append(
      label,
      button(
        'Mark as label error',
        'write a correction that the next audit applies',
        () => send('relabel', select.value),
        'go',
      ),
      button('Leave the image out', 'write a correction that leaves it out', () => send('drop')),
    );
    if (rows.some((i) => this.corrections[p.paths[i]]))
      box.append(button('Take back', 'remove the correction', () => send('none')));
    if (given)
      box.append(
        make('p', 'hint', given.action === 'relabel' ? `Marked: it is ${given.label}.` : `Marked: ${given.action}.`),
      );
    box.append(make('p', 'hint', `Corrections stand in ${p.corrections_file}.`));
    return box;
  }

  markSelected() {
    if (this.state.open) return this.parts.detail.querySelector('.marker select, .marker button')?.focus();
    const rows = this.marked.size ? [...this.marked] : this.found.length ? [this.found[this.focus]] : [];
    if (!rows.length) return;
    const what = rows.length > 1 ? `${count(rows.length)} selected` : this.data.page.paths[rows[0]];
    const box = this.parts.marking,
      close = button('✕', 'close', () => box.replaceChildren(), 'icon');
    box.replaceChildren(
      make(
        'div',
        'sheet-card small',
        make('div', 'head', make('strong', '', what), make('span', 'space'), close),
        this.marker(rows),
      ),
    );
  }

  exportCsv() {
    const d = this.data,
      p = d.page,
      rows = this.marked.size ? [...this.marked].sort((a, b) => a - b) : [...this.found];
    const quote = (v) => (/[",\r\n]/.test(v) ? `"${v.replaceAll('"', '""')}"` : v);
    const head = [
      'path',
      'split',
      'label',
      'predicted',
      'confidence',
      'correct',
      'label_score',
      'findings',
      'correction',
      ...p.columns.map((c) => c.name),
    ];
    if (p.reference) head.push('reference');
    const lines = rows.map((i) => {
      const c = this.corrections[p.paths[i]];
      const line = [
        p.paths[i],
        p.splits[d.split[i]],
        p.classes[d.label[i]],
        p.classes[d.predicted[i]],
        String(d.confidence[i]),
        d.correct[i] ? 'True' : 'False',
        Number.isNaN(d.label_score[i]) ? '' : String(d.label_score[i]),
        d.findings(i).join(' '),
        c ? c.label || c.action : '',
        ...p.columns.map((x) => d.columnText(i, x)),
      ];
      if (p.reference) line.push(d.referencePredicted[i] >= 0 ? p.classes[d.referencePredicted[i]] : '');
      return line.map(quote).join(',');
    });
    const link = make('a');
    link.href = URL.createObjectURL(
      new Blob([[head.map(quote).join(','), ...lines].join('\n') + '\n'], { type: 'text/csv' }),
    );
    link.download = `${p.run}-images.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    this.say(`${count(rows.length)} images are in ${link.download}.`);
  }

  // Keys and the rest

  key(event) {
    const typing = event.target.closest?.('input:not([type=checkbox], [type=range]), select, textarea');
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === 'Escape') return this.escape(event);
    if (typing) return;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -(this.across || 1), ArrowDown: this.across || 1 };
    const acts = {
      Enter: () => this.found.length && this.open(this.found[this.focus]),
      ' ': () => this.found.length && this.pick(this.found[this.focus]),
      m: () => this.data.page.can_mark && this.markSelected(),
      e: () => this.exportCsv(),
      '?': () => this.help(),
      r: () => this.reset(),
      a: () => this.set({ show: 'all' }),
      c: () => this.set({ show: 'correct' }),
      w: () => this.set({ show: 'wrong' }),
    };
    const onButton = event.target.closest?.('button, summary, a');
    if (event.key in steps && event.target.type === 'range') return; // they move the slider
    if (event.key in steps) this.move(steps[event.key]);
    else if (event.key in acts && !(onButton && ['Enter', ' '].includes(event.key))) acts[event.key]();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  escape(event) {
    if (this.helpBox) {
      this.helpBox.remove();
      this.helpBox = null;
    } else if (this.parts.marking.childElementCount) this.parts.marking.replaceChildren();
    else if (this.state.open) this.set({ open: NONE });
    else if (this.marked.size) {
      this.marked.clear();
      this.showGrid(true);
    } else this.say('');
    event.stopPropagation();
  }

  help() {
    if (this.helpBox) {
      this.helpBox.remove();
      this.helpBox = null;
      return;
    }
    const rows = HELP.map(([key, text]) => make('tr', '', make('th', '', make('kbd', '', key)), make('td', '', text)));
    const close = button('✕', 'close (Esc)', () => this.help(), 'icon');
    this.helpBox = make(
      'div',
      'detail help',
      make(
        'div',
        'sheet-card small',
        make('div', 'head', make('strong', '', 'Keys'), make('span', 'space'), close),
        make('table', 'facts', ...rows),
      ),
    );
    this.root.append(this.helpBox);
    setOnTop(this.helpBox, true);
  }

  // Voila's frames clip and have a colour of their own: what is sticky would not stay

  fitFrame() {
    if (!this.data.page.in_address || !this.root.isConnected) return; // JupyterLab
    document.body.style.background = getComputedStyle(this.root).backgroundColor;
    for (let node = this.root.parentElement; node && node !== document.body; node = node.parentElement) {
      const style = getComputedStyle(node);
      if (/auto|scroll/.test(style.overflowY) && node.scrollHeight > node.clientHeight + 1) {
        node.style.background = document.body.style.background;
        break;
      }
      if (style.overflow !== 'visible') node.style.overflow = 'visible';
    }
  }

  turnTheme() {
    const dark = this.state.theme ? this.state.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    this.set({ theme: dark ? 'light' : 'dark' });
  }

  async copyLink() {
    try {
      await navigator.clipboard.writeText(location.href);
      this.say('The address is copied. A browser on this machine opens it after a login with the token.');
    } catch {
      this.say(location.href);
    }
  }
}

function render({ model, el }) {
  const page = new Page(model, el);
  return () => page.close();
}

export default { render };
