// The parts of the panels. Each is made for a node inside an element, and returns the function that
// shows the present state, given the model's description, or undefined and why there is none.

import { app } from '../../scripts/app.js'
import { drawSchedule } from './guidance.js'
import { estimate } from './durations.js'
import { isTrained, positions, presets, ratio, snap, withWindow } from './sizes.js'
import { duration, strings } from './strings.js'
import { translated } from './texts.js'
import { after, append, isLinked, originOf, snapping, widgetOf } from './widgets.js'

const OPTIONS = ['schedule', 'temperature', 'top_k', 'top_p']
const OWN = ['cfg', ...OPTIONS] // of these the model's own values are shown where others are set
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

  return (described, error) => {
    const model = (known = inWindow(node, described))
    const text = strings()
    const linked = isLinked(node, 'width') || isLinked(node, 'height')
    select.hidden = !model || linked
    select.title = text.size
    facts.textContent = model || error ? '' : text.noModel
    warning.textContent = error ? text.broken : ''
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
    const seconds = duringAll(node, model, described, width, height)
    if (seconds) facts.textContent += ` · ${text.time(duration(seconds))}`
    facts.title = seconds ? text.lastSpeed : ''
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

// Seconds for the pictures of a sampler, or for all rows of a sheet; undefined where no picture has been
// made yet.
function duringAll(node, model, described, width, height) {
  const pictures = (widgetOf(node, 'batch_size') ?? widgetOf(node, 'seeds'))?.value ?? 1
  const numbers = (name) => (widgetOf(node, name)?.value ?? '').match(/[\d.]+/g)
  const windows = numbers('windows')?.map((window) => withWindow(described, Number(window))) ?? [model]
  const rows = windows.map((one) =>
    estimate(one, positions(width, height, one), pictures, width * height)
  )
  if (rows.includes(undefined)) return undefined
  return (numbers('cfgs')?.length ?? 1) * rows.reduce((sum, seconds) => sum + seconds)
}

// The model's own settings. They come with a model that is connected or changed, in place of those of
// the model before and of the defaults of a new node; what the user has set, or a workflow, stays.
export function ownPart(node, root, refresh) {
  const line = append(root, 'a', 'own')
  let own // settings of the model that was connected last
  let loaded = false // from a workflow
  after(node, 'onConfigure', () => (loaded = true))
  const defaults = Object.fromEntries((node.widgets ?? []).map(({ name, value }) => [name, value]))

  function place(settings, names) {
    for (const name of names) {
      const widget = widgetOf(node, name)
      if (widget && !isLinked(node, name)) widget.value = settings[name]
    }
  }

  line.addEventListener('click', () => {
    node.graph?.beforeChange()
    place(own, OWN)
    node.graph?.afterChange()
    app.canvas.setDirty(true, true)
    refresh()
  })

  return (model) => {
    line.hidden = true
    if (!model) return
    const settings = model.generation
    if (own !== settings) {
      const before = own ?? (loaded ? {} : defaults)
      const names = ['width', 'height', ...OWN]
      place(settings, names.filter((name) => widgetOf(node, name)?.value === before[name]))
      own = settings
    }
    const others = OWN.filter((name) => {
      const widget = widgetOf(node, name)
      return widget && !widget.disabled && !isLinked(node, name) && widget.value !== own[name]
    })
    line.hidden = !others.length
    line.textContent = strings().own(others.map((name) => `${name} ${own[name]}`).join(', '))
    line.title = strings().useOwn
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

// The model card.
export function cardPart(node, root) {
  return (model, error) => {
    root.replaceChildren()
    if (!model) {
      append(root, 'div', 'warning').textContent = error ?? ''
      return
    }
    append(root, 'strong').textContent = model.card.title ?? ''
    append(root, 'div').textContent = translated(model.card.description ?? '')
    for (const [key, title] of Object.entries(strings().card)) {
      if (!model.card[key]) continue
      append(root, 'div', 'title').textContent = title
      append(root, 'div').textContent = translated(model.card[key])
    }
  }
}

// The model's description for the window that the node asks for.
function inWindow(node, model) {
  return model && withWindow(model, widgetOf(node, 'window')?.value)
}
