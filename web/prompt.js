// What the model reads of a prompt, and what it knows.

import { readPrompt } from './model.js'
import { strings } from './strings.js'
import { append, isLinked, widgetOf } from './widgets.js'

const TYPING = 300 // milliseconds of rest before the prompt is read
const LONGEST = 40 // letters of an unknown word

export function promptPart(node, root) {
  const line = append(root, 'div', 'facts')
  const draws = append(root, 'div', 'facts')
  const unknown = append(root, 'div', 'warning')
  const picker = append(root, 'input')
  const names = append(root, 'datalist')
  names.id = picker.name = `tokenshuffle-names-${Math.random().toString(36).slice(2)}`
  picker.setAttribute('list', names.id)
  let asked, read, listed, timer

  picker.addEventListener('change', () => {
    if (![...names.children].some(({ value }) => value === picker.value)) return
    insert(widgetOf(node, 'text'), picker.value)
    picker.value = ''
  })

  async function show(checkpoint, text) {
    const answer = await readPrompt(checkpoint, text)
    if (text !== asked) return
    read = `${checkpoint}\n${text}`
    const { tokens, limit } = answer
    const said = strings()
    line.classList.toggle('warning', Boolean(answer.error) || tokens > limit)
    line.textContent = answer.error ?? said[tokens > limit ? 'tooLong' : 'tokens'](tokens, limit)
    draws.textContent = answer.draws?.length ? said.draws(answer.draws.join(', ')) : ''
    const words = (answer.unknown ?? []).map(([word, near]) => said.word(short(word), near))
    unknown.textContent = words.length ? said.unknown(words.join(', ')) : ''
  }

  return (model) => {
    const widget = widgetOf(node, 'text')
    const linked = isLinked(node, 'text')
    picker.hidden = linked || !model?.names.length
    if (listed !== model?.names) {
      listed = model?.names
      names.replaceChildren(...(listed ?? []).map((name) => new Option(name)))
      picker.placeholder = strings().insert
      area(widget).placeholder = model?.example || 'text'
    }
    if (!model || linked) {
      line.textContent = draws.textContent = unknown.textContent = ''
      asked = read = undefined
    } else if (read !== `${model.checkpoint}\n${widget.value}`) {
      asked = widget.value
      clearTimeout(timer)
      timer = setTimeout(() => show(model.checkpoint, asked), TYPING)
    }
  }
}

function short(word) {
  const letters = [...word]
  return letters.length > LONGEST ? `${letters.slice(0, LONGEST).join('')}…` : word
}

function area(widget) {
  return widget.element ?? widget.inputEl ?? {}
}

// Puts a name where the cursor is.
function insert(widget, name) {
  const text = widget.value
  const { selectionStart: start = text.length, selectionEnd: end = start } = area(widget)
  const before = text.slice(0, start)
  const after = text.slice(end)
  widget.value = [before, name, after].map((part) => part.trim()).filter(Boolean).join(' ')
  widget.callback?.(widget.value)
}
