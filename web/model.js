// What the server says about the checkpoint that a node works with.

import { api } from '../../scripts/api.js'
import { language } from './strings.js'

const described = new Map() // checkpoint -> promise of its description

export function forget() {
  described.clear()
}

// The name of the checkpoint behind the node's model input. Reroutes are followed; where the
// link cannot be (subgraphs, get and set nodes), it is that of the only loader in the workflow.
export function checkpointOf(node, loaders) {
  for (let origin = node, steps = 0; origin && steps < 50; steps++) {
    if (origin.comfyClass === 'TokenShuffleLoader') return chosen(origin)
    const inputs = origin.inputs ?? []
    const named = inputs.findIndex((input) => input.type === 'TOKENSHUFFLE_MODEL')
    origin = origin.getInputNode?.(named < 0 && inputs.length === 1 ? 0 : named)
  }
  return loaders.length === 1 ? chosen(loaders[0]) : undefined
}

function chosen(loader) {
  return loader.widgets?.find((widget) => widget.name === 'checkpoint')?.value
}

// Resolves to the description with the checkpoint's name, or to {error} where it cannot be read.
export function describe(checkpoint) {
  if (!checkpoint) return Promise.resolve({})
  if (!described.has(checkpoint)) {
    const query = new URLSearchParams({ checkpoint, language: language() })
    const model = answer(api.fetchApi(`/tokenshuffle/model?${query}`))
    described.set(checkpoint, model.then((model) => ({ ...model, checkpoint })))
  }
  return described.get(checkpoint)
}

// Resolves to {tokens, limit} and, of a model with a closed vocabulary, {draws, unknown}; or to
// {error}.
export function readPrompt(checkpoint, text) {
  const body = JSON.stringify({ checkpoint, text, language: language() })
  const headers = { 'Content-Type': 'application/json' }
  return answer(api.fetchApi('/tokenshuffle/prompt', { method: 'POST', headers, body }))
}

async function answer(request) {
  try {
    const reply = await request
    return await reply.json()
  } catch (error) {
    return { error: String(error) } // the server is unreachable, or of another version
  }
}
