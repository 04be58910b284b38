// The parts of the panels. Each is made for a node inside an element, and returns the function that
// shows the present state, given the model's description, or undefined and why there is none.

import { app } from '../../scripts/app.js'
import { drawSchedule } from './guidance.js'
import { countTokens } from './model.js'
import { isTrained, positions, presets, ratio, snap, withWindow } from './sizes.js'
import { duration, strings } from './strings.js'

const OPTIONS = ['schedule', 'temperature', 'top_k', 'top_p']
const TYPING = 300 // milliseconds of rest before the tokens are counted
const MAX_POINTS = 1024 // of the curve

// Presets, the number of positions, and how long they take.
export function sizePart(node, root, refresh) {
  const select = append(root, 'select')
  const facts = append(root, 'div', 'facts')
  const warning = append(root, 'div', 'warning')
  let known // the model's description

  select.addEventListener('change', () => {
    const [width, height] = select.value.split('x').map(Number)
    node.graph?.beforeChange()
    widgetOf(node, 'width').value = width
    widgetOf(node, 'height').value = height
    node.graph?.afterChange()
    app.canvas.setDirty(true, true)
    refresh()
  })
  snapping(node, 'width', (side) => known && snap(side, widgetOf(node, 'height').value, known))
  snapping(node, 'height', (side) => known && snap(side, widgetOf(node, 'width').value, known))

  return (described) => {
    const model = (known = inWindow(node, described))
    const text = strings()
    const linked = isLinked(node, 'width') || isLinked(node, 'height')
    select.disabled = !model || linked
    select.title = text.size
    facts.textContent = model ? '' : text.noModel
    warning.textContent = ''
    if (!model || linked) return select.replaceChildren()
    const [width, height] = ['width', 'height'].map((name) => widgetOf(node, name).value)
    const sizes = presets(model)
    const options = sizes.map(([w, h]) => new Option(`${w} × ${h}  (${ratio(w, h)})`, `${w}x${h}`))
    if (!sizes.some(([w, h]) => w === width && h === height)) {
      options.push(new Option(`${width} × ${height}  (${text.custom})`, `${width}x${height}`))
    }
    select.replaceChildren(...options)
    select.value = `${width}x${height}`
    const count = positions(width, height, model)
    const asked = widgetOf(node, 'window')?.value
    facts.textContent = text.positions(count)
    if (model.speed) facts.textContent += ` · ${text.time(duration(count / model.speed))}`
    facts.title = model.speed ? text.lastSpeed : ''
    if (asked && !model.windows.includes(asked)) {
      warning.textContent = text.windows(model.windows.join(', '))
    } else if (count > model.max_positions) warning.textContent = text.tooLarge(model.max_positions)
    else if (!isTrained(width, height, model)) {
      const origin = originOf(node, 'options')
      const allowed = model.any_size || (origin && widgetOf(origin, 'any_size')?.value)
      warning.textContent = allowed ? text.untrained : text.refused
    }
  }
}

// What is kept of a picture snaps to whole positions.
export function keepPart(node) {
  let unit
  for (const name of ['keep_top', 'keep_left']) {
    snapping(node, name, (side) => unit && Math.round(side / unit) * unit)
  }
  return (model) => {
    unit = inWindow(node, model)?.unit
  }
}

// The schedule as it will be applied. Options that are connected take the place of the node's own.
export function guidancePart(node, root) {
  const caption = append(root, 'div', 'facts')
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
  root.append(svg)

  return (described) => {
    const model = inWindow(node, described)
    const options = originOf(node, 'options')
    for (const name of OPTIONS) {
      const widget = widgetOf(node, name)
      if (widget) widget.disabled = Boolean(options)
    }
    const schedule =
      widgetOf(options ?? node, 'schedule')?.value ?? model?.generation.schedule ?? 'half-linear'
    const cfg = widgetOf(node, 'cfg').value
    const [width, height] = ['width', 'height'].map((name) => widgetOf(node, name)?.value)
    const count = model && width ? positions(width, height, model) : MAX_POINTS
    caption.textContent = cfg === 1 ? strings().guidanceOff : strings().guidance
    drawSchedule(svg, schedule, cfg, Math.min(count, MAX_POINTS))
  }
}

// The length of the prompt against what the model reads.
export function tokensPart(node, root) {
  const line = append(root, 'div', 'facts')
  let asked, counted, timer

  async function count(checkpoint, text) {
    const answer = await countTokens(checkpoint, text)
    if (text !== asked) return
    counted = `${checkpoint}\n${text}`
    const { tokens, limit } = answer
    line.classList.toggle('warning', tokens > limit)
    if (answer.error) line.textContent = ''
    else line.textContent = strings()[tokens > limit ? 'tooLong' : 'tokens'](tokens, limit)
  }

  return (model) => {
    const text = widgetOf(node, 'text').value
    if (!model || isLinked(node, 'text')) {
      line.textContent = ''
      asked = counted = undefined
    } else if (counted !== `${model.checkpoint}\n${text}`) {
      asked = text
      clearTimeout(timer)
      timer = setTimeout(() => count(model.checkpoint, text), TYPING)
    }
  }
}

// The model card.
export function cardPart(node, root) {
  return (model, error) => {
    root.replaceChildren()
    if (!model) {
      append(root, 'div', 'warning').textContent = error ?? ''
      return
    }
    append(root, 'strong').textContent = model.card.title ?? ''
    append(root, 'div').textContent = model.card.description ?? ''
    for (const [key, title] of Object.entries(strings().card)) {
      if (!model.card[key]) continue
      append(root, 'div', 'title').textContent = title
      append(root, 'div').textContent = model.card[key]
    }
  }
}

function append(root, tag, className = '') {
  const made = document.createElement(tag)
  made.className = className
  root.append(made)
  return made
}

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name)
}

// The model's description for the window that the node asks for.
function inWindow(node, model) {
  return model && withWindow(model, widgetOf(node, 'window')?.value)
}

function isLinked(node, name) {
  return node.inputs?.some((input) => input.name === name && input.link != null) ?? false
}

// The node behind an input, past reroutes.
function originOf(node, name) {
  let origin = node.getInputNode(node.inputs.findIndex((input) => input.name === name))
  while (origin?.type === 'Reroute') origin = origin.getInputNode(0)
  return origin
}

// Brings the widget's value to what `nearest` says, wherever it is set by hand.
function snapping(node, name, nearest) {
  const widget = widgetOf(node, name)
  const original = widget.callback
  widget.callback = function (value, ...rest) {
    const snapped = nearest(value) || value
    if (snapped !== value) this.value = snapped
    return original?.call(this, snapped, ...rest)
  }
}
