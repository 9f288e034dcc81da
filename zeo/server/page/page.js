// Asks for the server's figures every other second, and draws what they were in the last minutes.
'use strict';

const EVERY = 2000;            // milliseconds between two questions
const PATIENCE = 5000;         // for an answer
const SPAN = 300;              // seconds that are shown
const LEFT = 52, RIGHT = 6, TOP = 8, BOTTOM = 20;   // of a chart: what is beside the lines, in pixels

const kept = {};               // by storage: what was asked for, oldest first
let chosen = null;             // the storage that is shown

// ---- numbers in words

function number(value) {
  if (value === null || value === undefined) return '–';
  const units = [[1e9, 'G'], [1e6, 'M'], [1e4, 'k']];
  for (const [size, unit] of units) if (value >= size) return trim(value / (size === 1e4 ? 1e3 : size)) + ' ' + unit;
  return trim(value);
}
function trim(value) {
  if (value === 0) return '0';
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1).replace(/\.0$/, '') :
    value.toFixed(2).replace(/\.?0+$/, '');
}
function bytes(value) {
  if (value === null || value === undefined) return '–';
  for (const [size, unit] of [[1e12, 'TB'], [1e9, 'GB'], [1e6, 'MB'], [1e3, 'kB']])
    if (value >= size) return trim(value / size) + ' ' + unit;
  return trim(value) + ' B';
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return '–';
  if (seconds <= 0) return '0 s';
  if (seconds < 1e-3) return trim(seconds * 1e6) + ' µs';
  if (seconds < 1) return trim(seconds * 1e3) + ' ms';
  if (seconds < 120) return trim(seconds) + ' s';
  if (seconds < 7200) return Math.round(seconds / 60) + ' min';
  if (seconds < 172800) return Math.round(seconds / 3600) + ' h';
  return Math.round(seconds / 86400) + ' days';
}
const percent = share => share === null || share === undefined ? '–' : Math.round(100 * share) + ' %';

// ---- what is drawn: each chart has one or two lines, made from two answers that follow each other
// (`least`: its scale reaches at least so far; `whole`: there are no fractions; `logarithmic`: each step is ten times
// as much, from `least` to 1000 times that, or farther)

const rate = key => (now, before, seconds) => (now[key] - before[key]) / seconds;
function quantile(key, share) {
  return (now, before) => {
    const bounds = now.durations[key].bounds;
    const counts = now.durations[key].counts.map((count, i) => count - before.durations[key].counts[i]);
    const all = counts.reduce((sum, count) => sum + count, 0);
    if (!all) return null;
    let sum = 0;
    for (let i = 0; i < counts.length; i++) {
      if (sum + counts[i] >= share * all) {
        if (i === bounds.length) return bounds[i - 1];
        const lower = i ? bounds[i - 1] : 0;
        return lower + (bounds[i] - lower) * (share * all - sum) / counts[i];
      }
      sum += counts[i];
    }
    return null;
  };
}
const CHARTS = [
  {title: 'Loads per second', show: number, least: 10, lines: [['', rate('loads')]]},
  {title: 'Commits per second', show: number, least: 2,
   lines: [['commits', rate('commits')], ['conflicts', rate('conflicts')]]},
  {title: 'Answering a load', show: duration, logarithmic: true, least: 1e-5,
   lines: [['median', quantile('load', .5)], ['99 %', quantile('load', .99)]]},
  {title: 'Waiting for the commit lock', show: duration, logarithmic: true, least: 1e-5,
   lines: [['median', quantile('vote_wait', .5)], ['99 %', quantile('vote_wait', .99)]]},
  {title: 'Finishing a commit', show: duration, logarithmic: true, least: 1e-5,
   lines: [['median', quantile('finish', .5)], ['99 %', quantile('finish', .99)]]},
  {title: 'Commit lock held for', show: duration, least: 2, lines: [['', now => now.holder ? now.now - now.holder.since : 0]],
   note: now => now.holder ? 'by ' + now.holder.client + (now.waiting ? '; ' + now.waiting + ' waiting' : '') : 'it is free'},
  {title: 'Clients', show: number, whole: true, least: 4, lines: [['', now => now.clients.length]]},
  {title: 'Cache lag of clients', whole: true, least: 4, show: value => number(value) + (value === 1 ? ' commit' : ' commits'),
   lines: [['', now => Math.max(0, ...now.clients.map(client => client.behind))]],
   note: () => 'commits that the slowest has not been told of'},
  {title: 'Traffic', show: value => bytes(Math.round(value)) + '/s', least: 1000,
   lines: [['sent', rate('sent')], ['received', rate('received')]]},
];

// ---- elements

const $ = id => document.getElementById(id);
function html(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}
function svg(tag, attributes, text) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  if (text !== undefined) element.textContent = text;
  return element;
}

// ---- a chart

function points(chart) {
  const answers = kept[chosen] || [];
  const found = [];
  for (let i = 1; i < answers.length; i++) {
    const now = answers[i], before = answers[i - 1], seconds = now.now - before.now;
    // A server that was started again counts from zero.
    if (seconds > 0 && now.started === before.started)
      found.push({at: now.now, gap: seconds > 3 * EVERY / 1000,
                  values: chart.lines.map(line => line[1](now, before, seconds))});
  }
  return found;
}
function scale(chart, values) {
  // The values of the lines across, from the lowest to the highest.
  const most = Math.max(chart.least, ...values);
  if (chart.logarithmic) {
    const power = value => Math.floor(Math.log10(value) + 1e-9);
    const first = power(Math.min(chart.least, ...values.filter(value => value > 0)));
    const last = Math.max(first + 3, power(most * .999) + 1);
    const ticks = [];
    for (let each = first; each <= last; each++) ticks.push(10 ** each);
    return ticks;
  }
  const power = 10 ** Math.floor(Math.log10(most));
  const top = power * (chart.whole ? [1, 2, 4, 6, 8, 10] : [1, 2, 4, 5, 8, 10]).find(step => step * power >= most * .999);
  return chart.whole && top % 2 ? [0, top] : [0, top / 2, top];
}
function draw(chart) {
  const data = points(chart);
  const drawing = chart.svg, width = drawing.clientWidth || 320, height = drawing.clientHeight || 150;
  drawing.setAttribute('viewBox', `0 0 ${width} ${height}`);
  drawing.replaceChildren();
  const end = data.length ? data[data.length - 1].at : 0;
  const ticks = scale(chart, data.flatMap(point => point.values.map(value => value || 0)));
  const least = ticks[0], most = ticks[ticks.length - 1];
  const share = chart.logarithmic ? value => Math.log(Math.max(value, least) / least) / Math.log(most / least) :
    value => value / most;
  const x = at => LEFT + (width - LEFT - RIGHT) * (1 - (end - at) / SPAN);
  const y = value => TOP + (height - TOP - BOTTOM) * (1 - share(value));
  ticks.forEach((value, i) => {
    drawing.append(svg('line', {class: i ? 'grid' : 'base', x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value)}));
    if (ticks.length < 6 || i % 2 === 0)
      drawing.append(svg('text', {x: LEFT - 6, y: y(value) + 4, 'text-anchor': 'end'},
                         chart.show(value).replace(/ commits?$/, '')));
  });
  for (const [minutes, anchor] of [[5, 'start'], [2.5, 'middle'], [0, 'end']])
    drawing.append(svg('text', {x: x(end - 60 * minutes), y: height - 4, 'text-anchor': anchor},
                       minutes ? '−' + minutes + ' min' : 'now'));
  // The first line lies on top of the second.
  for (let i = chart.lines.length - 1; i >= 0; i--) {
    let path = '', area = '', first = null, last = null;
    const close = () => { if (first !== null) area += `L${last.toFixed(1)} ${y(0)}L${first.toFixed(1)} ${y(0)}Z`; };
    for (const point of data) {
      const value = point.values[i];
      if (value === null || point.gap) { close(); first = null; if (value === null) continue; }
      const here = `${x(point.at).toFixed(1)} ${y(Math.min(value, most)).toFixed(1)}`;
      path += (first === null ? 'M' : 'L') + here;
      area += (first === null ? 'M' : 'L') + here;
      if (first === null) first = x(point.at);
      last = x(point.at);
    }
    close();
    const kind = i ? 'two' : 'one';
    if (chart.lines.length === 1) drawing.append(svg('path', {class: 'area', d: area}));
    drawing.append(svg('path', {class: kind, d: path}));
  }
  if (!data.length)
    drawing.append(svg('text', {x: (LEFT + width) / 2, y: height / 2, 'text-anchor': 'middle'}, 'collecting …'));
  chart.data = data; chart.x = x; chart.y = y; chart.ceiling = most;
  caption(chart, data.length ? data[data.length - 1] : null, end);
  if (chart.pointer !== null) point(chart);
}
function caption(chart, shown, end) {
  const answers = kept[chosen] || [];
  chart.now.textContent = shown ? chart.show(shown.values[0]) : '–';
  chart.keys.replaceChildren();
  if (shown && shown.at !== end) chart.keys.append('at ' + new Date(shown.at * 1000).toLocaleTimeString() + '  ');
  if (chart.lines.length > 1) {
    chart.lines.forEach((line, i) => {
      chart.keys.append(i ? '   ' : '', html('b', line[0], i ? 'two' : 'one'),
                        ' ' + (shown ? chart.show(shown.values[i]) : '–'));
    });
  } else if (chart.note && shown && shown.at === end) {
    chart.keys.append(chart.note(answers[answers.length - 1]));
  }
  chart.svg.setAttribute('aria-label', chart.title + ': ' + (shown ? shown.values.map(chart.show).join(', ') : 'nothing yet'));
}
function point(chart) {
  chart.svg.querySelectorAll('.cursor, circle').forEach(element => element.remove());
  if (chart.pointer === null || !chart.data.length) return;
  let nearest = chart.data[0];
  for (const each of chart.data)
    if (Math.abs(chart.x(each.at) - chart.pointer) < Math.abs(chart.x(nearest.at) - chart.pointer)) nearest = each;
  const x = chart.x(nearest.at);
  chart.svg.append(svg('line', {class: 'cursor', x1: x, x2: x, y1: TOP,
                                 y2: chart.svg.clientHeight - BOTTOM}));
  nearest.values.forEach((value, i) => {
    if (value !== null) chart.svg.append(svg('circle', {class: i ? 'two' : 'one', cx: x, r: 3.5,
                                                        cy: chart.y(Math.min(value, chart.ceiling))}));
  });
  caption(chart, nearest, chart.data[chart.data.length - 1].at);
}
function make(chart) {
  const figure = html('figure'), words = html('figcaption');
  chart.now = html('span', '–', 'now');
  chart.keys = html('span', '', 'keys');
  chart.svg = svg('svg', {role: 'img', 'aria-label': chart.title});
  chart.pointer = null;
  words.append(html('h2', chart.title), chart.now, chart.keys);
  figure.append(words, chart.svg);
  const moved = event => {
    const point_ = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.svg.getScreenCTM().inverse());
    chart.pointer = point_.x;
    point(chart);
  };
  chart.svg.addEventListener('pointermove', moved);
  chart.svg.addEventListener('pointerdown', moved);
  chart.svg.addEventListener('pointerleave', () => { chart.pointer = null; draw(chart); });
  $('charts').append(figure);
}

// ---- the rest of the page

function date(tid) {
  // A tid is a time in minutes, in a calendar of months of 31 days, and a part of a minute.
  const minutes = parseInt(tid.slice(0, 8), 16), part = parseInt(tid.slice(8), 16);
  if (!minutes) return 'none';
  const days = Math.floor(minutes / 1440), months = Math.floor(days / 31);
  return new Date(Date.UTC(1900 + Math.floor(months / 12), months % 12, days % 31 + 1, Math.floor(minutes / 60) % 24,
                           minutes % 60, part * 60 / 2 ** 32)).toLocaleString();
}
function facts(now) {
  const list = [
    ['Size', bytes(now.size)], ['Objects', number(now.length)], ['Last commit', date(now['last-transaction'])],
    ['Commits', number(now.commits)], ['Conflicts', number(now.conflicts) + ' (' + number(now.conflicts_resolved) + ' resolved)'],
    ['Aborts', number(now.aborts)], ['Room on its disk', bytes(now.room)], ['Running for', duration(now.now - now.started)]];
  $('facts').replaceChildren(...list.map(([name, value]) => {
    const box = html('div');
    box.append(html('dt', name), html('dd', value));
    return box;
  }));
}
function pack(now) {
  const {share, phase, since} = now.pack || {};
  $('pack').hidden = !now.pack;
  $('pack-words').textContent = now.pack ? `${phase}, for ${duration(now.now - since)}` : '';
  $('pack-share').textContent = percent(share);
  $('pack-bar').value = share || 0;
}
function clients(now) {
  const rows = now.clients.map(client => {
    const row = html('tr');
    row.append(html('td', client.address), html('td', client.label || '–'),
               ...[['for', duration(now.now - client.since)], ['received', bytes(client.received)],
                   ['sent', bytes(client.sent)], ['unread', bytes(client.unsent)], ['lag', number(client.behind)],
                  ].map(([name, text]) => { const cell = html('td', text, 'n'); cell.dataset.name = name; return cell; }));
    return row;
  });
  document.querySelector('tbody').replaceChildren(...rows);
  document.querySelector('.table').hidden = !rows.length;
  document.querySelector('.none').hidden = rows.length > 0;
}
function tabs(names) {
  const nav = $('storages');
  nav.hidden = names.length < 2;
  if (nav.dataset.names === names.join('\n') + '\n' + chosen) return;
  nav.dataset.names = names.join('\n') + '\n' + chosen;
  nav.replaceChildren(...names.map(name => {
    const button = html('button', name);
    button.setAttribute('aria-pressed', name === chosen);
    button.addEventListener('click', () => { chosen = name; show(names); });
    return button;
  }));
}
function show(names) {
  tabs(names);
  const answers = kept[chosen];
  if (!answers) return;
  const now = answers[answers.length - 1];
  facts(now);
  pack(now);
  clients(now);
  CHARTS.forEach(draw);
}
function tell(text, kind) {
  $('state').textContent = text;
  $('state').className = kind;
  document.body.classList.toggle('stale', kind === 'bad');
}
async function ask() {
  try {
    const answer = await fetch('/figures.json', {signal: AbortSignal.timeout(PATIENCE), cache: 'no-store'});
    if (answer.status === 503) return tell('the server is opening its storages …', '');
    if (!answer.ok) throw new Error('the server answers ' + answer.status);
    const figures = await answer.json();
    const names = Object.keys(figures.storages);
    for (const name of names) {
      const answers = kept[name] = kept[name] || [];
      answers.push({...figures.storages[name], now: figures.now});
      while (answers[0].now < figures.now - SPAN - 5) answers.shift();
    }
    if (!names.includes(chosen)) chosen = names[0];
    tell('serving, version ' + figures.version, 'good');
    show(names);
  } catch (error) {
    tell('no answer since ' + (last ? last.toLocaleTimeString() : 'the page was opened') + '; asking again', 'bad');
    return;
  } finally {
    setTimeout(ask, EVERY);
  }
  last = new Date();
}
let last = null;
$('where').textContent = location.host;
document.title = 'zeo ' + location.host;
CHARTS.forEach(make);
new ResizeObserver(() => CHARTS.forEach(draw)).observe($('charts'));
ask();
