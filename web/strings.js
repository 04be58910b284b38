// What the panels say, in the language of the page.

import { app } from '../../scripts/app.js'

const STRINGS = {
  en: {
    size: 'Size',
    custom: 'own size',
    positions: (count) => `${count} positions`,
    time: (seconds) => `about ${seconds}`,
    lastSpeed: 'At the speed of the last run',
    untrained: 'The model was not trained at this size.',
    tooLarge: (limit) => `More than the ${limit} positions that this model holds.`,
    windows: (list) => `This model serves the windows ${list}.`,
    noModel: 'Connect a model to see its sizes.',
    guidance: 'Guidance from the first token to the last',
    guidanceOff: 'Guidance is off: cfg is 1',
    tokens: (count, limit) => `${count} / ${limit} tokens`,
    tooLong: (count, limit) => `${count} / ${limit} tokens: shorten the prompt`,
    card: {
      usage_hint: 'Prompts',
      sizes: 'Sizes',
      scores: 'Scores',
      limits: 'Limits',
      subjects: 'Subjects',
      data: 'Data',
      training: 'Training',
      license: 'Licence',
      author: 'Author',
      date: 'Date',
    },
  },
  zh: {
    size: '尺寸',
    custom: '自定义尺寸',
    positions: (count) => `${count} 个位置`,
    time: (seconds) => `约 ${seconds}`,
    lastSpeed: '按上次运行的速度估算',
    untrained: '模型没有用这个尺寸训练过。',
    tooLarge: (limit) => `超出此模型可容纳的 ${limit} 个位置。`,
    windows: (list) => `此模型支持的窗口：${list}。`,
    noModel: '连接模型后显示可用尺寸。',
    guidance: '从第一个到最后一个 token 的引导强度',
    guidanceOff: '引导已关闭：cfg 为 1',
    tokens: (count, limit) => `${count} / ${limit} 个 token`,
    tooLong: (count, limit) => `${count} / ${limit} 个 token：请缩短提示词`,
    card: {
      usage_hint: '提示词',
      sizes: '尺寸',
      scores: '得分',
      limits: '局限',
      subjects: '主题',
      data: '数据',
      training: '训练',
      license: '许可证',
      author: '作者',
      date: '日期',
    },
  },
  ja: {
    size: 'サイズ',
    custom: '任意のサイズ',
    positions: (count) => `${count} ポジション`,
    time: (seconds) => `約 ${seconds}`,
    lastSpeed: '前回の実行速度による見積もり',
    untrained: 'このサイズではモデルは学習していません。',
    tooLarge: (limit) => `このモデルが扱える ${limit} ポジションを超えています。`,
    windows: (list) => `このモデルが扱えるウィンドウ：${list}。`,
    noModel: 'モデルを接続するとサイズが表示されます。',
    guidance: '最初から最後のトークンまでのガイダンス',
    guidanceOff: 'ガイダンスはオフです（cfg が 1）',
    tokens: (count, limit) => `${count} / ${limit} トークン`,
    tooLong: (count, limit) => `${count} / ${limit} トークン：プロンプトを短くしてください`,
    card: {
      usage_hint: 'プロンプト',
      sizes: 'サイズ',
      scores: 'スコア',
      limits: '限界',
      subjects: '題材',
      data: 'データ',
      training: '学習',
      license: 'ライセンス',
      author: '作者',
      date: '日付',
    },
  },
}

export function strings() {
  const locale = app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en'
  return STRINGS[locale.split('-')[0]] ?? STRINGS.en
}

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`
  if (seconds < 60) return `${Math.round(seconds)} s`
  const whole = Math.round(seconds)
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, '0')} min`
}
