'use strict';
const $ = id => document.getElementById(id);
const COLORS = Number(document.documentElement.dataset.colors), PATTERNS = 5, TINT = 0.4;
const LOST = 'The connection to the server was lost before the end of the answer.';
let key = '', models = [], experts = [], turns = [], running = null, shown = null, isAtEnd = true;
const gatesOf = new WeakMap();

/** Return an element. All text goes through textContent: what a model writes is never HTML. */
function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
        if (name in element) element[name] = value; else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
}
const percent = share => share >= 0.9995 ? '100%' : share < 0.0005 ? '0%' : `${(share * 100).toFixed(1)}%`;
/** Return the CSS classes of an expert: its colour, as in the report, and its underline. */
const look = name => {
    const number = Math.max(0, experts.indexOf(name));
    return number ? `e${(number - 1) % COLORS + 1} p${(number - 1) % PATTERNS + 1}` : 'e0';
};
const swatch = name => make('span', {className: `key ${look(name)}`, ariaHidden: 'true'}, 'ab');

// The server

/** Send a request. Throws an Error with one readable line. */
async function send(path, body, signal) {
    const headers = body ? {'Content-Type': 'application/json'} : {};
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
        response = await fetch(path, {method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body), signal, cache: 'no-store'});
    } catch (error) {
        throw error.name === 'AbortError' ? error : new Error('The server cannot be reached. Is dylora serve still running?');
    }
    if (response.ok) return response;
    let line = `status ${response.status}`;
    try { line = (await response.json()).error.message; } catch { /* not this server's own error */ }
    if (response.status === 401) {
        line = key ? 'The server refuses this API key.' : 'The server asks for an API key.';
        $('ask-key').hidden = false;
        $('key').focus();
    }
    throw new Error(line);
}

/** Yield the JSON events of a stream. Comments tell how much of the prompt was read. */
async function* events(response, comment) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ''; ;) {
        const {value, done} = await reader.read().catch(error => {
            throw error.name === 'AbortError' ? error : new Error(LOST);
        });
        if (done) throw new Error(LOST);  // before its last event
        const lines = (rest + value).split('\n');
        rest = lines.pop();
        for (const line of lines) {
            if (line.startsWith(':')) comment(line.slice(1).trim());
            if (line === 'data: [DONE]') return;
            if (!line.startsWith('data: ')) continue;
            const event = JSON.parse(line.slice(6));
            if (event.error) throw new Error(event.error.message);
            yield event;
        }
    }
}

async function loadModels() {
    problem('');
    let list;
    try {
        list = await (await send('v1/models')).json();
    } catch (error) {
        return problem(error.message);
    }
    $('ask-key').hidden = true;
    [models, experts] = [list.data, list.experts];
    $('name').textContent = document.title = models[0].id;
    models.forEach((model, i) => {  // the mixture, one model for each gate, and the mixture routed once a prompt
        model.what = i === 0 ? 'mixture' : i === 1 ? 'base alone' : i <= experts.length ? `expert ${experts[i - 1]}` : 'mixture, routed once a prompt';
    });
    const options = () => models.map(model => make('option', {value: model.id}, `${model.what} · ${model.id}`));
    $('model').replaceChildren(...options());
    $('beside').replaceChildren(make('option', {value: ''}, 'nothing'), ...options());
    $('legend').replaceChildren(...experts.map(name => make('li', {}, swatch(name), name)));
    describeForm();
}

function problem(line) {
    $('problem').replaceChildren(...line ? [make('p', {className: 'error'}, line)] : []);
}

const modelOf = id => models.find(model => model.id === id);
const chosen = () => [$('model').value, $('beside').value].filter(Boolean).map(modelOf);

/** Say what a prompt is for the chosen model: a message, or the beginning of a text. */
function describeForm() {
    const isChat = chosen()[0]?.format === 'chat', isAnyChat = chosen().some(model => model.format === 'chat');
    $('prompt').placeholder = isChat ? 'Ask something' : 'Write the beginning of a text';
    $('prompt-label').textContent = isChat ? 'Message' : 'Text to continue';
    $('new').textContent = isChat ? 'New chat' : 'Clear';
    $('system-field').hidden = !isAnyChat;
    $('welcome').textContent = isChat ? 'This run learned chats: write a message, and the conversation goes on from there.'
        : 'This run learned plain text: write a beginning, and the model goes on from there. Every prompt stands for itself.';
}

// Answers

/** Return the messages of a conversation, up to the last prompt, as the model in this column saw it. */
function messages(column) {
    const list = $('system').value.trim() ? [{role: 'system', content: $('system').value}] : [];
    const last = turns.at(-1);
    for (const turn of turns.slice(0, -1)) {
        const text = (turn.answers[column] ?? turn.answers[0]).text;
        // Without its answer a prompt is left out: most chat templates refuse two messages of the user in a row.
        if (text) list.push({role: 'user', content: turn.prompt}, {role: 'assistant', content: text});
    }
    return [...list, {role: 'user', content: last.prompt}];
}

function requestBody(model, list, prompt) {
    const body = {model: model.id, stream: true, stream_options: {include_usage: true}, routing: true};
    for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) {
        if ($(name).value !== '') body[name] = Number($(name).value);
    }
    return model.format === 'chat' ? {...body, messages: list} : {...body, prompt};
}

/** Append a token, or the text of several, in the look of its last one. */
function token(block, text, gates, className = '') {
    const span = make('span', {className, tabIndex: -1}, text);
    if (gates) {
        const [name, gate] = Object.entries(gates)[0] ?? ['base', 1];
        span.className = `${look(name)} ${className}`.trim();
        span.style.setProperty('--g', (name === 'base' ? gate * TINT / 2 : gate * TINT).toFixed(2));
        gatesOf.set(span, gates);
        if (!block.querySelector('[tabindex="0"]')) span.tabIndex = 0;  // one stop for Tab; arrows move on from there
    }
    block.append(span);
}

/** Draw the mean gates of an answer's tokens. */
function drawShares(box, sums, count) {
    const shares = Object.entries(sums).map(([name, sum]) => [name, sum / count]).sort((a, b) => b[1] - a[1]);
    const bar = make('div', {className: 'bar', ariaHidden: 'true'});
    for (const [name, share] of shares) {
        const part = make('i', {className: look(name)});
        part.style.setProperty('width', `${share * 100}%`);
        bar.append(part);
    }
    const items = shares.filter(([, share]) => share >= 0.0005).map(([name, share]) => make('li', {}, swatch(name), `${name} ${percent(share)}`));
    box.replaceChildren(bar, make('ul', {className: 'legend shares', ariaLabel: 'Shares of the experts, mean gates'}, ...items));
}

/** Keep the end of the conversation in sight, unless someone has scrolled up. */
function follow() {
    if (isAtEnd) $('log').scrollTop = $('log').scrollHeight;
}

/** Ask one model, and draw its answer as it comes. Errors become a line in the answer. */
async function answer(model, list, prompt, view, result, signal) {
    const {section, block, meta, box} = view, started = performance.now(), sums = {};
    let first = 0, count = 0, usage = null, reason = '', text = '', due = false;
    const draw = () => {  // once a frame: a look at the heights lays the whole answer out
        due = false;
        if (count) drawShares(box, sums, count);
        follow();
    };
    try {
        const path = model.format === 'chat' ? 'v1/chat/completions' : 'v1/completions';
        const response = await send(path, requestBody(model, list, prompt), signal);
        for await (const event of events(response, line => { if (!first) meta.textContent = line.replace('keepalive', 'reads the prompt:'); })) {
            usage = event.usage ?? usage;
            const choice = event.choices[0];
            if (!choice) continue;
            reason = choice.finish_reason ?? reason;
            const thought = choice.delta?.reasoning ?? '', piece = choice.text ?? choice.delta?.content ?? '';
            const routing = choice.routing ?? [];
            if (thought) token(block, thought, routing.at(-1), 'think');
            if (piece) token(block, piece, routing.at(-1));
            text += piece;
            if (!thought && !piece) continue;
            first ||= performance.now();
            for (const gates of routing) {
                count += 1;
                for (const [name, gate] of Object.entries(gates)) sums[name] = (sums[name] ?? 0) + gate;
            }
            meta.textContent = `${count} tokens`;
            if (!due) due = requestAnimationFrame(draw) > 0;
        }
    } catch (error) {
        reason = error.name === 'AbortError' ? 'stopped' : 'error';
        result.failed = reason === 'error';
        if (result.failed) section.append(make('p', {className: 'error', role: 'alert'}, error.message));
    }
    draw();
    block.hidden = result.failed && !text;
    result.text = text;
    const seconds = (performance.now() - first) / 1000, parts = [];
    if (count) parts.push(`${usage?.completion_tokens ?? count} tokens`, `first after ${((first - started) / 1000).toFixed(1)} s`);
    if (count > 1 && seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(0)} tokens/s`);
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (usage) parts.push(`prompt of ${usage.prompt_tokens}${cached ? `, ${cached} cached` : ''}`);
    if (reason === 'length') parts.push('ended at max tokens');
    if (reason === 'stopped') parts.push('stopped');
    if (!text && reason === 'stop') parts.push('an empty answer');
    meta.textContent = parts.join(' · ');
    section.classList.remove('busy');
    block.ariaBusy = 'false';
    follow();
}

/** Tint a prompt that is plain text as the mixture routes it. */
async function tintPrompt(block, prompt, signal) {
    try {
        const routed = await (await send('v1/route', {text: prompt}, signal)).json();
        if (routed.tokens.join('') !== prompt) return;
        block.replaceChildren();
        routed.tokens.forEach((text, i) => {
            const pairs = routed.gates[i].map((gate, e) => [routed.names[e], gate]).filter(([, gate]) => gate > 0);
            token(block, text, Object.fromEntries(pairs.sort((a, b) => b[1] - a[1])));
        });
    } catch { /* the prompt stays as it is; what is wrong shows in the answer */ }
}

async function ask() {
    const prompt = $('prompt').value, asked = chosen();
    if (running || !prompt.trim() || !asked.length) return;
    if (![...$('sampling').querySelectorAll('input')].every(input => input.checkValidity())) {
        showSampling(true);
        return $('form').reportValidity();
    }
    const turn = {prompt, answers: []}, abort = running = new AbortController();
    turns.push(turn);
    const block = make('p', {className: 'text asked'}, prompt), answers = make('div', {className: asked.length > 1 ? 'answers two' : 'answers'});
    $('empty').hidden = true;
    $('log').append(make('section', {className: 'turn', ariaLabel: `Prompt ${turns.length}`}, make('h2', {className: 'sr'}, 'Prompt'), block, answers));
    const work = asked.map((model, column) => {
        const view = {
            block: make('p', {className: 'text', ariaLive: 'polite', ariaBusy: 'true', ariaLabel: `Answer of ${model.id}`, role: 'group'}),
            meta: make('small', {}, 'waits'), box: make('div'),
        };
        view.section = make('section', {className: 'answer busy'}, make('h3', {}, model.id, view.meta), view.block, view.box);
        answers.append(view.section);
        const list = messages(column);
        turn.answers[column] = {text: '', failed: false};
        return answer(model, list, prompt, view, turn.answers[column], abort.signal);
    });
    if (asked.some(model => model.format !== 'chat' && model.id === models[0].id)) work.push(tintPrompt(block, prompt, abort.signal));
    $('prompt').value = '';
    grow($('prompt'));
    setRunning(true);
    isAtEnd = true;
    follow();
    await Promise.all(work);
    running = null;
    setRunning(false);
    if (turn.answers.every(({text, failed}) => failed && !text) && !$('prompt').value && turns.includes(turn)) {
        $('prompt').value = prompt;  // to ask again, once what was wrong is put right
        grow($('prompt'));
    }
}

function setRunning(isRunning) {
    const hadFocus = [$('send'), $('stop')].includes(document.activeElement);
    [$('send').hidden, $('stop').hidden] = [isRunning, !isRunning];
    if (hadFocus) $(isRunning ? 'stop' : 'send').focus();
    $('status').textContent = isRunning ? 'Writing …' : 'Done.';
}

// Gates of a token

const visible = text => text.replaceAll('\n', '⏎').replaceAll('\t', '⇥').replace(/^ +| +$/g, blanks => '·'.repeat(blanks.length));

function showGates(span) {
    if (shown === span) return;
    hideGates();
    const gates = gatesOf.get(span);
    if (!gates) return;
    shown = span;
    const rows = Object.entries(gates).map(([name, gate]) => make('tr', {}, make('th', {scope: 'row'}, swatch(name), ` ${name}`), make('td', {}, percent(gate))));
    const caption = make('caption', {}, 'Gates of ', make('code', {}, visible(span.textContent)));
    $('gates').replaceChildren(make('table', {}, caption, make('tbody', {}, ...rows)));
    $('gates').hidden = false;
    span.classList.add('shown');
    span.setAttribute('aria-describedby', 'gates');
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect(), tip = $('gates').getBoundingClientRect();
    const below = at.bottom + 6 + tip.height < innerHeight;
    $('gates').style.setProperty('left', `${Math.max(8, Math.min(at.left, innerWidth - tip.width - 8))}px`);
    $('gates').style.setProperty('top', `${below ? at.bottom + 6 : Math.max(8, at.top - tip.height - 6)}px`);
}

function hideGates() {
    if (!shown) return;
    shown.classList.remove('shown');
    shown.removeAttribute('aria-describedby');
    shown = null;
    $('gates').hidden = true;
}

function moveToken(event) {
    const span = event.target, spans = [...span.parentElement.querySelectorAll('span[tabindex]')], at = spans.indexOf(span);
    const next = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1}[event.key];
    if (next === undefined || !spans[next]) return;
    event.preventDefault();
    [span.tabIndex, spans[next].tabIndex] = [-1, 0];
    spans[next].focus();
}

// Controls

const isDark = () => document.documentElement.dataset.theme ? document.documentElement.dataset.theme === 'dark'
    : matchMedia('(prefers-color-scheme: dark)').matches;

function setTheme(theme) {
    if (theme === 'dark' || theme === 'light') document.documentElement.dataset.theme = theme;
    $('theme').textContent = isDark() ? 'Light' : 'Dark';
    $('theme').ariaLabel = `${$('theme').textContent} theme`;
}

function grow(area) {
    area.style.setProperty('height', 'auto');
    area.style.setProperty('height', `${area.scrollHeight + 2}px`);
}

function showSampling(isOpen) {
    $('sampling').hidden = !isOpen;
    $('more').ariaExpanded = String(isOpen);
}

const on = (target, type, work) => target.addEventListener(type, work);
try { setTheme(localStorage.getItem('dylora-theme')); } catch { setTheme(''); }
on($('theme'), 'click', () => {
    const theme = isDark() ? 'light' : 'dark';
    setTheme(theme);
    try { localStorage.setItem('dylora-theme', theme); } catch { /* storage is off: for this visit only */ }
});
on(matchMedia('(prefers-color-scheme: dark)'), 'change', () => setTheme(''));
on($('more'), 'click', () => showSampling($('sampling').hidden));
on($('new'), 'click', () => {
    running?.abort();
    turns = [];
    hideGates();
    document.querySelectorAll('.turn:not(#empty)').forEach(turn => turn.remove());
    $('empty').hidden = false;
    $('prompt').focus();
});
on($('form'), 'submit', event => { event.preventDefault(); ask(); });
on($('ask-key'), 'submit', event => {
    event.preventDefault();
    key = $('key').value;
    $('key').value = '';
    loadModels().then(() => { if (models.length) $('prompt').focus(); });
});
on($('stop'), 'click', () => running?.abort());
on($('model'), 'change', describeForm);
on($('beside'), 'change', describeForm);
for (const area of [$('prompt'), $('system')]) on(area, 'input', () => grow(area));
on($('prompt'), 'keydown', event => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        ask();
    } else if (event.key === 'ArrowUp' && !$('prompt').value && turns.length) {
        event.preventDefault();
        $('prompt').value = turns.at(-1).prompt;  // to change and ask it again
        grow($('prompt'));
    }
});
on(document, 'keydown', event => {
    if (event.key !== 'Escape') return;
    if (running) running.abort(); else hideGates();
});
for (const [type, work] of [['pointerover', showGates], ['focusin', showGates]]) {
    on($('log'), type, event => { if (gatesOf.has(event.target)) work(event.target); else if (type === 'pointerover') hideGates(); });
}
on($('log'), 'pointerleave', hideGates);
on($('log'), 'focusout', hideGates);
on($('log'), 'scroll', () => {
    hideGates();
    isAtEnd = $('log').scrollHeight - $('log').scrollTop - $('log').clientHeight < 60;
});
on($('log'), 'keydown', event => { if (gatesOf.has(event.target)) moveToken(event); });
// Not by the attribute autofocus: it complains on the console where the question for a key has the focus first.
$('prompt').focus();
loadModels();
