// The panels on the pack's nodes: sizes, guidance, token count and model card.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { checkpointOf, describe, forget } from './model.js'
import { cardPart, guidancePart, keepPart, ownPart, sizePart } from './parts.js'
import { promptPart } from './prompt.js'
import { translated } from './texts.js'
import { after, widgetOf } from './widgets.js'

// Parts from top to bottom, and the pixels they need; a panel that grows takes the node's spare
// room.
const PANELS = {
  TokenShuffleLoader: { parts: [cardPart], height: 120, grows: true },
  TokenShufflePrompt: { parts: [promptPart], height: 88 },
  TokenShuffleSampler: { parts: [ownPart, sizePart, guidancePart], height: 158 },
  TokenShuffleOptions: { parts: [ownPart], height: 17 },
  TokenShuffleXYSheet: { parts: [ownPart, sizePart], height: 68 },
  TokenShuffleComplete: { parts: [ownPart, keepPart, guidancePart], height: 90 }
}

// One for each type of wire: none is that of a type of ComfyUI, and each stands out on a dark canvas and
// on a light one.
const WIRES = {
  TOKENSHUFFLE_MODEL: '#8467e0',
  TOKENSHUFFLE_PROMPT: '#c77a0a',
  TOKENSHUFFLE_OPTIONS: '#1f9468'
}

const FIRST_TEMPLATE = 'Text to image'
const MARGIN = 6 // pixels around a panel
const nodes = new Map() // node on the canvas -> function that brings its panel up to date
let scheduled

const isLoader = (node) => node.comfyClass === 'TokenShuffleLoader'

function refresh() {
  scheduled ??= setTimeout(async () => {
    scheduled = undefined
    // A node that went into a subgraph left one like it there, and has no graph.
    const present = [...nodes].filter(([node]) => node.graph)
    const loaders = present.map(([node]) => node).filter(isLoader)
    for (const [node, update] of present) {
      const model = await describe(checkpointOf(node, loaders))
      update(model.stride ? model : undefined, model.error)
    }
  })
}

function addPanel(node, { parts, height, grows }) {
  const root = document.createElement('div')
  root.className = grows ? 'tokenshuffle-panel grows' : 'tokenshuffle-panel'
  root.style.minHeight = `${height}px`
  root.dataset.captureWheel = 'true' // scrolls the panel, and does not zoom the canvas
  const updates = parts.map((part) => part(node, root, refresh))
  // The last widget, and not saved: the values of a workflow keep their order without the panel.
  const widget = node.addDOMWidget('tokenshuffle_panel', 'tokenshuffle_panel', root, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => height + 2 * MARGIN,
    getMaxHeight: () => (grows ? undefined : height + 2 * MARGIN)
  })
  widget.serialize = false
  const update = (...state) => updates.forEach((one) => one(...state))
  nodes.set(node, update)
  after(node, 'onAdded', () => nodes.set(node, update))
  after(node, 'onRemoved', () => nodes.delete(node))
  for (const name of ['onAdded', 'onRemoved', 'onConfigure', 'onConnectionsChange']) {
    after(node, name, refresh)
  }
}

function colourWires() {
  const tables = [app.canvas.constructor.link_type_colors, app.canvas.default_connection_color_byType]
  for (const [type, colour] of Object.entries(WIRES)) {
    document.body.style.setProperty(`--color-datatype-${type}`, colour) // of Vue nodes
    for (const table of tables) {
      let ofTheme // every theme sets all types anew, and those that it does not know to ''
      Object.defineProperty(table, type, {
        configurable: true,
        enumerable: true,
        get: () => ofTheme || colour,
        set: (value) => (ofTheme = value)
      })
    }
  }
}

// The server lists templates in the order of its disk.
function sortTemplates() {
  const pack = decodeURIComponent(new URL(import.meta.url).pathname.split('/').at(-2))
  const list = api.getWorkflowTemplates
  api.getWorkflowTemplates = async function () {
    const templates = await list.call(this)
    const rank = (name) => (name === FIRST_TEMPLATE ? 0 : 1)
    templates[pack]?.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b))
    return templates
  }
}

// %date:...% and %Node.widget% in a file's name, as the page does it for its own nodes that save.
function fillIn(widget) {
  widget.serializeValue = () => window.comfyAPI.utils.applyTextReplacements(app, widget.value)
}

// The server does not know the page's language.
function translateProgress() {
  const dispatch = api.dispatchCustomEvent
  api.dispatchCustomEvent = function (type, detail) {
    if (type !== 'progress_text') return dispatch.call(this, type, detail)
    return dispatch.call(this, type, { ...detail, text: translated(detail.text) })
  }
}

app.registerExtension({
  name: 'TokenShuffle',

  init() {
    const link = document.createElement('link')
    link.rel = 'stylesheet'
    link.href = new URL('./tokenshuffle.css', import.meta.url)
    document.head.append(link)
    sortTemplates()
    translateProgress()
    // A run has measured the speed again.
    api.addEventListener('execution_success', forgetAndRefresh)
    app.ui?.settings?.addEventListener('Comfy.Locale.change', forgetAndRefresh)
  },

  setup: colourWires,

  nodeCreated(node) {
    if (node.comfyClass === 'TokenShuffleSaveCodes') fillIn(widgetOf(node, 'filename_prefix'))
    if (!(node.comfyClass in PANELS)) return
    addPanel(node, PANELS[node.comfyClass])
    for (const widget of node.widgets ?? []) after(widget, 'callback', refresh)
    refresh()
  },

  // Codes were no latents once, and image tokenizers no VAEs. The page takes the types of links from
  // the workflow.
  loadedGraphNode(node) {
    if (!node.comfyClass?.startsWith('TokenShuffle')) return
    for (const { links, type } of node.outputs ?? []) {
      for (const id of links ?? []) Object.assign(node.graph.getLink(id) ?? {}, { type })
    }
  },

  // The user asked to read the models' folder again.
  refreshComboInNodes: forgetAndRefresh
})

function forgetAndRefresh() {
  forget()
  refresh()
}
