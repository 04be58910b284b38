// What the panels say, in the language of the page.

import { app } from '../../scripts/app.js'

const STRINGS = {
  en: {
    size: 'Size',
    custom: 'custom size',
    positions: (count) => `${count} positions`,
    time: (seconds) => `about ${seconds}`,
    lastSpeed: 'Estimated from the last run',
    untrained: 'The model was not trained at this size.',
    refused: 'Not a size that the model was trained at: needs any_size of Token-Shuffle Options.',
    tooLarge: (limit) => `Too large: this model has room for ${limit} positions.`,
    windows: (list) => `Windows that this model supports: ${list}.`,
    noModel: 'Connect a model to see its sizes.',
    broken: 'The model cannot be read: its loader says why.',
    guidance: 'Guidance over the picture',
    guidanceOff: 'Guidance is off: cfg is 1',
    tokens: (count, limit) => `${count} / ${limit} tokens`,
    tooLong: (count, limit) => `${count} / ${limit} tokens: shorten the prompt`,
    draws: (what) => `draws: ${what}`,
    unknown: (words) => `does not know: ${words}`,
    word: (word, near) => (near ? `${word} (near: ${near})` : word),
    insert: 'insert a subject …',
    own: (settings) => `The model's own: ${settings}`,
    useOwn: 'Click to use the settings that the model was made for',
    card: {
      usage_hint: 'Prompts',
      sizes: 'Sizes',
      limits: 'Limits',
      subjects: 'Subjects',
      license: 'Licence',
      author: 'Author',
      date: 'Date',
      training: 'Training',
      data: 'Data',
      scores: 'Scores',
    },
  },
  zh: {
    size: '尺寸',
    custom: '自定义尺寸',
    positions: (count) => `${count} 个位置`,
    time: (seconds) => `约 ${seconds}`,
    lastSpeed: '按上次运行的速度估算',
    untrained: '模型未用此尺寸训练过。',
    refused: '模型未用此尺寸训练过：需要“Token-Shuffle 选项”中的“任意尺寸”。',
    tooLarge: (limit) => `尺寸过大：此模型最多容纳 ${limit} 个位置。`,
    windows: (list) => `此模型支持的窗口：${list}。`,
    noModel: '连接模型后显示可用尺寸。',
    broken: '无法读取模型：原因见加载器。',
    guidance: '引导强度随画面的变化',
    guidanceOff: '引导已关闭：cfg 为 1',
    tokens: (count, limit) => `${count} / ${limit} 个词元`,
    tooLong: (count, limit) => `${count} / ${limit} 个词元：请缩短提示词`,
    draws: (what) => `将绘制：${what}`,
    unknown: (words) => `不认识：${words}`,
    word: (word, near) => (near ? `${word}（相近：${near}）` : word),
    insert: '插入主题……',
    own: (settings) => `模型自带设置：${settings}`,
    useOwn: '点击以使用模型自带的设置',
    card: {
      usage_hint: '提示词',
      sizes: '尺寸',
      limits: '局限',
      subjects: '主题',
      license: '许可证',
      author: '作者',
      date: '日期',
      training: '训练',
      data: '数据',
      scores: '得分',
    },
  },
  ja: {
    size: 'サイズ',
    custom: 'カスタム',
    positions: (count) => `${count} ポジション`,
    time: (seconds) => `約 ${seconds}`,
    lastSpeed: '前回の実行速度による見積もり',
    untrained: 'モデルはこのサイズで学習していません。',
    refused: 'モデルはこのサイズで学習していません：「Token-Shuffle オプション」の「任意のサイズ」が必要です。',
    tooLarge: (limit) => `大きすぎます：このモデルが扱えるのは ${limit} ポジションまでです。`,
    windows: (list) => `このモデルが扱えるウィンドウ：${list}。`,
    noModel: 'モデルを接続するとサイズが表示されます。',
    broken: 'モデルを読み込めません：理由はローダーにあります。',
    guidance: '画像全体でのガイダンス',
    guidanceOff: 'ガイダンスはオフです（cfg が 1）',
    tokens: (count, limit) => `${count} / ${limit} トークン`,
    tooLong: (count, limit) => `${count} / ${limit} トークン：プロンプトを短くしてください`,
    draws: (what) => `描くもの：${what}`,
    unknown: (words) => `知らない言葉：${words}`,
    word: (word, near) => (near ? `${word}（近い言葉：${near}）` : word),
    insert: '題材を挿入…',
    own: (settings) => `モデル本来の設定：${settings}`,
    useOwn: 'クリックするとモデル本来の設定になります',
    card: {
      usage_hint: 'プロンプト',
      sizes: 'サイズ',
      limits: '限界',
      subjects: '題材',
      license: 'ライセンス',
      author: '作者',
      date: '日付',
      training: '学習',
      data: 'データ',
      scores: 'スコア',
    },
  },
}

export function language() {
  return (app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en').split('-')[0]
}

export function strings() {
  return STRINGS[language()] ?? STRINGS.en
}

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`
  if (seconds < 60) return `${Math.round(seconds)} s`
  const whole = Math.round(seconds)
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, '0')} min`
}
