// The panels on the pack's nodes: sizes, guidance, token count and model card.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { checkpointOf, describe, forget } from './model.js'
import { cardPart, guidancePart, keepPart, ownPart, sizePart } from './parts.js'
import { promptPart } from './prompt.js'
import { after } from './widgets.js'

// Parts from top to bottom, and the pixels they need; a panel that grows takes the node's spare
// room.
const PANELS = {
  TokenShuffleLoader: { parts: [cardPart], height: 120, grows: true },
  TokenShufflePrompt: { parts: [promptPart], height: 80 },
  TokenShuffleSampler: { parts: [ownPart, sizePart, guidancePart], height: 158 },
  TokenShuffleOptions: { parts: [ownPart], height: 17 },
  TokenShuffleXYSheet: { parts: [ownPart, sizePart], height: 68 },
  TokenShuffleComplete: { parts: [ownPart, keepPart, guidancePart], height: 90 }
}

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

app.registerExtension({
  name: 'TokenShuffle',

  init() {
    const link = document.createElement('link')
    link.rel = 'stylesheet'
    link.href = new URL('./tokenshuffle.css', import.meta.url)
    document.head.append(link)
    // A run has measured the speed again.
    api.addEventListener('execution_success', forgetAndRefresh)
  },

  nodeCreated(node) {
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
