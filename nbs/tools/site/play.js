// A solver on an exact mixture, moved by hand. PLAY (play_data.js) holds centres, standard
// deviation, noise samples and the solvers to start from: {name: {N: {nodes, M}}}.
'use strict';
const play = (() => {
  const PATHS = 12;  // trajectories that are drawn
  const TEACHER = 200;  // steps
  const YOURS = '#d55e00', START = '#3b8fd0';
  const { centres, std, noise, starts } = PLAY;

  // E[x_1 - x_0 | x_t] of a mixture of Gaussians of equal weights, t = 0 noise, t = 1 data
  function velocity([x, y], t) {
    const variance = (t * std) ** 2 + (1 - t) ** 2;
    const gain = (t * std ** 2 - (1 - t)) / variance;
    const logs = centres.map(([a, b]) => -((x - t * a) ** 2 + (y - t * b) ** 2) / (2 * variance));
    const most = Math.max(...logs);
    let sum = 0, u = 0, v = 0;
    centres.forEach(([a, b], k) => {
      const p = Math.exp(logs[k] - most);
      sum += p;
      u += p * (a + gain * (x - t * a));
      v += p * (b + gain * (y - t * b));
    });
    return [u / sum, v / sum];
  }

  // states [N + 1][sample] and the velocities [N][sample] between them
  function run(nodes, M) {
    const states = [noise], velocities = [];
    M.forEach((row, i) => {
      velocities.push(states[i].map(x => velocity(x, nodes[i])));
      const h = nodes[i + 1] - nodes[i];
      states.push(states[i].map((x, s) => [0, 1].map(c =>
        row.slice(0, i + 1).reduce((sum, m, j) => sum + h * m * velocities[j][s][c], x[c]))));
    });
    return { states, velocities };
  }

  function adams2(N) {
    const nodes = Array.from({ length: N + 1 }, (_, i) => i / N);
    const M = nodes.slice(1).map((_, i) =>
      nodes.slice(1).map((_, j) => j === i ? (i ? 1.5 : 1) : j === i - 1 ? -0.5 : 0));
    return { nodes, M };
  }

  const rule = adams2(TEACHER), teacher = (() => {  // without the zeros of its table
    const states = [noise], velocities = [];
    for (let i = 0; i < TEACHER; i++) {
      velocities.push(states[i].map(x => velocity(x, rule.nodes[i])));
      states.push(states[i].map((x, s) => [0, 1].map(c => {
        const now = velocities[i][s][c];
        return x[c] + (i ? 1.5 * now - 0.5 * velocities[i - 1][s][c] : now) / TEACHER;
      })));
    }
    velocities.push(states[TEACHER].map(x => velocity(x, 1)));
    return { states, velocities };
  })();

  // the teacher's states at any time: cubic, with its velocities as slopes
  function truth(t) {
    const i = Math.min(Math.floor(t * TEACHER), TEACHER - 1), s = t * TEACHER - i;
    const [a, b] = [teacher.states[i], teacher.states[i + 1]];
    const [u, v] = [teacher.velocities[i], teacher.velocities[i + 1]];
    const w = [(1 + 2 * s) * (1 - s) ** 2, s * (1 - s) ** 2, s * s * (3 - 2 * s), s * s * (s - 1)];
    return a.map((x, k) => [0, 1].map(c =>
      w[0] * x[c] + w[1] / TEACHER * u[k][c] + w[2] * b[k][c] + w[3] / TEACHER * v[k][c]));
  }

  function rmse(states, target) {
    let sum = 0;
    states.forEach(([x, y], k) => sum += (x - target[k][0]) ** 2 + (y - target[k][1]) ** 2);
    return Math.sqrt(sum / (2 * states.length));
  }

  function look({ nodes, M }) {
    const { states } = run(nodes, M);
    return { nodes, states, errors: states.map((x, k) => k ? rmse(x, truth(nodes[k])) : 0) };
  }

  // the page
  const root = document.getElementById('play');
  root.innerHTML = `<div class="controls"><label>start <select name="start"></select></label>
    <label>evaluations N <select name="steps"></select></label>
    <button type="button">reset</button></div>
    <p><output aria-live="polite"></output></p>
    <div class="times" role="group" aria-label="nodes"></div>
    <div class="panels"><canvas class="paths" role="img"></canvas><div class="side">
    <small>coefficients: a row a step, a column an evaluation</small>
    <div class="table" role="group" aria-label="coefficients"></div>
    <canvas class="errors" role="img"></canvas></div></div>`;
  const find = selector => root.querySelector(selector);
  const [startMenu, stepsMenu] = root.querySelectorAll('select');
  const canvases = { paths: find('.paths'), errors: find('.errors') };
  let solver, first, euler, pending = null;
  const latency = [];  // milliseconds from an input to its picture

  for (let n = 3; n <= 8; n++) stepsMenu.add(new Option(n, n));
  for (const name in starts) startMenu.add(new Option(name, name));
  [stepsMenu.value, startMenu.value] = [5, 'Adams 2'];

  function begin() {
    const N = stepsMenu.value;
    for (const option of startMenu.options) option.disabled = !(N in starts[option.value]);
    if (startMenu.selectedOptions[0].disabled) startMenu.value = 'Adams 2';
    solver = structuredClone(starts[startMenu.value][N]);
    [first, euler] = [look(solver), look(starts.Euler[N])];
    buildTimes();
    buildTable();
    update();
  }

  function buildTimes() {
    const inner = solver.nodes.slice(1, -1).map((t, k) =>
      `<input type="range" min="0" max="1" step="any" aria-label="node ${k + 1}">`);
    find('.times').innerHTML = `<span>0</span><div>${inner.join('')}</div><span>1</span>`;
    root.querySelectorAll('.times input').forEach((input, k) => {
      const move = (value, event) => {
        const [low, high] = [solver.nodes[k] + 0.005, solver.nodes[k + 2] - 0.005];
        solver.nodes[k + 1] = Math.min(Math.max(value, low), high);
        changed(event);
      };
      input.addEventListener('input', event => move(+input.value, event));
      input.addEventListener('keydown', event => {
        const way = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
        if (!way) return;
        event.preventDefault();
        move(solver.nodes[k + 1] + 0.01 * way, event);
      });
    });
  }

  function buildTable() {
    const N = solver.M.length, cells = [];
    for (let i = 0; i < N; i++)
      for (let j = 0; j < N; j++)
        cells.push(j < i ? `<input type="number" step="0.01" aria-label="step ${i + 1},
          evaluation ${j + 1}" data-at="${i},${j}">` : `<b data-at="${i},${j}"></b>`);
    const table = find('.table');
    table.style.setProperty('--n', N);
    table.innerHTML = cells.join('');
    table.querySelectorAll('input').forEach(input => {
      const [i, j] = input.dataset.at.split(',');
      const set = event => {
        if (input.value === '' || !isFinite(input.value)) return;
        solver.M[i][j] = +input.value;
        changed(event);
      };
      input.addEventListener('input', set);
      input.addEventListener('focus', () => input.select());
      scrub(input, set);
    });
  }

  function scrub(input, set) {  // drag to the left and to the right, 0.01 a pixel
    let from = null;
    input.addEventListener('pointerdown', e => from = { x: e.clientX, value: +input.value });
    input.addEventListener('pointermove', event => {
      if (!from || !event.buttons) return;
      const dx = event.clientX - from.x;
      if (!from.moved && Math.abs(dx) < 4) return;
      from.moved = true;
      input.setPointerCapture(event.pointerId);
      input.value = (from.value + 0.01 * dx).toFixed(2);
      set(event);
    });
    for (const end of ['pointerup', 'pointercancel']) input.addEventListener(end, () => from = null);
  }

  function changed(event) {  // one picture a frame
    if (pending !== null) return;
    pending = event.timeStamp;
    requestAnimationFrame(() => {
      update();
      const channel = new MessageChannel();  // its message comes after the frame
      channel.port1.onmessage = () => latency.push(performance.now() - since);
      const since = pending;
      pending = null;
      channel.port2.postMessage(0);
    });
  }

  const decimals = x => x.toFixed(2).replace('-', '\u2212');

  function update() {
    solver.M.forEach((row, i) => row[i] = 1 - row.slice(0, i).reduce((a, b) => a + b, 0));
    const now = look(solver), end = v => v.errors[v.errors.length - 1].toFixed(4);
    find('output').innerHTML = `RMSE to the teacher at the end: <b>${end(now)}</b>,
      at the start ${end(first)}, Euler ${end(euler)}`;
    root.querySelectorAll('.times input').forEach((e, k) => e.value = solver.nodes[k + 1]);
    const limit = Math.max(1.5, ...solver.M.flat().map(Math.abs));
    root.querySelectorAll('[data-at]').forEach(cell => {
      const [i, j] = cell.dataset.at.split(',').map(Number), m = solver.M[i][j];
      if (j > i) return;
      const strength = Math.min(Math.abs(m) / limit, 1) * 0.75;
      cell.style.background = `rgb(${m > 0 ? '213 94 0' : '0 114 178'} / ${strength})`;
      if (j === i) cell.textContent = decimals(m);
      else if (cell !== document.activeElement || +cell.value !== m) cell.value = m.toFixed(2);
    });
    drawPaths(now);
    drawErrors(now);
  }

  const colour = name => getComputedStyle(document.body).getPropertyValue(`--color-${name}`);

  function canvas(element, height) {  // context and width, in pixels of the page
    const width = element.clientWidth, scale = devicePixelRatio;
    if (element.width !== Math.round(width * scale)) {
      element.style.height = `${height(width)}px`;
      [element.width, element.height] = [width, height(width)].map(v => Math.round(v * scale));
    }
    const context = element.getContext('2d');
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height(width));
    context.font = '12px sans-serif';
    return [context, width, height(width)];
  }

  function line(c, points, stroke, width = 1.2) {
    c.strokeStyle = stroke;
    c.lineWidth = width;
    c.beginPath();
    points.forEach(([x, y]) => c.lineTo(x, y));
    c.stroke();
  }

  function dots(c, points, fill, radius) {
    c.fillStyle = fill;
    c.beginPath();
    for (const [x, y] of points) {
      c.moveTo(x + radius, y);
      c.arc(x, y, radius, 0, 7);
    }
    c.fill();
  }

  function drawPaths(now) {
    const [c, size] = canvas(canvases.paths, width => width);
    const place = ([x, y]) => [(x + 2.6) / 5.2 * size, (2.6 - y) / 5.2 * size];
    const grey = colour('foreground-muted'), N = now.nodes.length - 1;
    dots(c, teacher.states[TEACHER].map(place), grey, 1.6);
    dots(c, now.states[N].map(place), YOURS, 1.6);
    for (let s = 0; s < PATHS; s++) {
      line(c, teacher.states.map(x => place(x[s])), grey);
      const path = now.states.map(x => place(x[s]));
      line(c, path, YOURS, 1);
      dots(c, path, YOURS, 2.6);
    }
    c.fillStyle = grey;
    c.fillText('teacher', 8, 16);
    c.fillStyle = YOURS;
    c.fillText('yours', 8, 32);
    canvases.paths.setAttribute('aria-label', `${PATHS} trajectories and ${noise.length} ends`);
  }

  function drawErrors(now) {
    const [c, width, height] = canvas(canvases.errors, () => 190);
    const text = colour('foreground-primary'), [left, right, top, bottom] = [44, 50, 18, 32];
    const place = (t, e) => [left + t * (width - left - right),
      top + (-Math.log10(Math.max(e, 1e-3)) / 3) * (height - top - bottom)];
    c.fillStyle = text;
    c.fillText('RMSE to the teacher', left, 11);
    for (const e of [1, 0.1, 0.01, 0.001]) {
      const [x, y] = place(0, e);
      c.fillText(e, 6, y + 4);
      line(c, [[x, y], place(1, e)], colour('background-border'), 1);
    }
    for (const t of [0, 0.5, 1]) c.fillText(t, place(t, 1)[0] - 4, height - 16);
    c.fillText('time t', place(0.5, 1)[0] - 14, height - 2);
    const lines = [['Euler', euler, colour('foreground-muted')], ['start', first, START],
      ['yours', now, YOURS]];
    const ends = [];  // labels at the line ends, 13 pixels apart
    for (const [name, v, stroke] of lines) {
      const points = v.nodes.slice(1).map((t, k) => place(t, v.errors[k + 1]));
      line(c, points, stroke, name === 'yours' ? 2 : 1.2);
      dots(c, points, stroke, 3);
      ends.push([points[points.length - 1][1], name, stroke]);
    }
    let free = 0;
    for (const [y, name, stroke] of ends.sort((a, b) => a[0] - b[0])) {
      free = Math.max(free + 13, y + 4);
      c.fillStyle = stroke;
      c.fillText(name, width - right + 8, free);
    }
    canvases.errors.setAttribute('aria-label', `error at the nodes: ${now.errors.join(', ')}`);
  }

  startMenu.addEventListener('change', begin);
  stepsMenu.addEventListener('change', begin);
  find('button').addEventListener('click', begin);
  window.addEventListener('resize', update);
  new MutationObserver(update).observe(document.body, { attributeFilter: ['data-theme'] });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', update);
  begin();
  return { run, look, latency, get solver() { return solver; } };
})();
