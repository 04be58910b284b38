// Texts that come from the server or a checkpoint in English, in the language of the page.

import { language } from './strings.js'

// Numbers in braces stand for what is different from one text to the next.
const TEXTS = [
  // progress
  {
    en: '{1} / {2}, {3}/s, {4} left',
    zh: '{1} / {2}，{3}/s，剩余 {4}',
    ja: '{1} / {2}、{3}/s、残り {4}',
  },
  {
    en: '{1} / {2} positions, {3}/s',
    zh: '{1} / {2} 个位置，{3}/s',
    ja: '{1} / {2} ポジション、{3}/s',
  },
  {
    en: '{1}x{2}, {3} positions, a size that the model was not trained at',
    zh: '{1}x{2}，{3} 个位置，模型未用此尺寸训练过',
    ja: '{1}x{2}、{3} ポジション、モデルはこのサイズで学習していません',
  },
  {
    en: '{1}x{2}, {3} positions',
    zh: '{1}x{2}，{3} 个位置',
    ja: '{1}x{2}、{3} ポジション',
  },
  {
    en: 'cropped from {1} to {2}',
    zh: '已从 {1} 裁剪为 {2}',
    ja: '{1} から {2} に切り抜きました',
  },
  // model cards
  {
    en: 'A small Token-Shuffle model that draws {1} subjects as emoji in {2} styles, in ten colours, counted, small or big, or two together, from prompts in {3} languages ({4}).',
    zh: '小型 Token-Shuffle 模型，可绘制 {1} 个表情符号主题，有 {2} 种风格和十种颜色，可指定数量、大小，或两个主题同图；提示词可用 {3} 种语言（{4}）。',
    ja: '絵文字の題材 {1} 種を {2} つのスタイルと十色で描く小さな Token-Shuffle モデルです。個数や大小の指定、二つの題材の組み合わせもでき、プロンプトは {3} 言語（{4}）で書けます。',
  },
  {
    en: '"a SUBJECT, STYLE style" with a style of {1}; "a COLOUR SUBJECT", "three SUBJECTS", "a SUBJECT left of a SUBJECT", "on a COLOUR background"; articles, capitals and a full stop do not matter',
    zh: '“主题，某某风格”，风格有 {1}；“某色的主题”“三个主题”“主题在主题的左边”“某色背景”；冠词、大小写和句号无影响',
    ja: '「題材、○○スタイル」（スタイルは {1}）、「○色の題材」「三つの題材」「題材の左に題材」「○色の背景」。冠詞、大文字と小文字、句点の違いは影響しません',
  },
  {
    en: 'It has memorised its small data set and knows no other subject; it is still learning colours, backgrounds and several subjects, which come out rough, two different ones as blobs; it draws at the sizes listed; fine detail is blurred by the image tokenizer.',
    zh: '它记住了自己的小数据集，不认识其他主题；颜色、背景和多个主题仍在学习中，画得粗糙，两个不同的主题会成为模糊的色块；只能按所列尺寸绘制；细节会被图像分词器抹糊。',
    ja: '小さなデータセットを暗記したモデルで、ほかの題材は知りません。色、背景、複数の題材はまだ学習の途中で粗く、異なる二つの題材はぼやけた塊になります。描けるのは挙げたサイズだけで、細部は画像トークナイザーでぼけます。',
  },
  {
    en: 'on two CPU cores: the first bundled model ({1} subjects, English and Chinese, some 3 h), then ten languages, a window head and compositions, some 8 h; then {2} steps of 32 pictures with Muon on {3} compositions in colours, sizes and places, with captions of many forms, {4} h',
    zh: '在两个 CPU 核心上：先是最初的内置模型（{1} 个主题，英文和中文，约 3 小时），再加十种语言、窗口头和组合画面，约 8 小时；然后用 Muon 以每步 32 张图训练 {2} 步，含颜色、大小、位置各异的 {3} 个组合，描述句式多样，{4} 小时',
    ja: '2 つの CPU コアで学習：まず最初の同梱モデル（題材 {1} 種、英語と中国語、約 3 時間）、次に十の言語、ウィンドウヘッド、組み合わせの画像（約 8 時間）、さらに Muon で 32 枚ずつ {2} ステップ、色・大きさ・位置の異なる {3} 通りの組み合わせと多様な文型の説明文で {4} 時間',
  },
  {
    en: 'Apache-2.0; trained on pictures under MIT and Apache-2.0',
    zh: 'Apache-2.0；训练图片采用 MIT 和 Apache-2.0 许可',
    ja: 'Apache-2.0。学習に使った画像は MIT と Apache-2.0 のライセンスです',
  },
  {
    en: 'the ComfyUI-TokenShuffle developers',
    zh: 'ComfyUI-TokenShuffle 开发者',
    ja: 'ComfyUI-TokenShuffle の開発者',
  },
  {
    en: 'LlamaGen, class-conditional: the prompt is the number or the name of an ImageNet class.',
    zh: 'LlamaGen，按类别生成：提示词为 ImageNet 类别的编号或名称。',
    ja: 'LlamaGen、クラス条件付き：プロンプトは ImageNet のクラスの番号か名前です。',
  },
  {
    en: 'Janus: the prompt describes the picture.',
    zh: 'Janus：用提示词描述画面。',
    ja: 'Janus：プロンプトで画像を説明します。',
  },
  {
    en: 'SimpleAR: the prompt describes the picture, in English.',
    zh: 'SimpleAR：用英语提示词描述画面。',
    ja: 'SimpleAR：英語のプロンプトで画像を説明します。',
  },
  {
    en: 'MIT (code); the image tokenizer: NVIDIA Open Model License',
    zh: '代码采用 MIT 许可；图像分词器采用 NVIDIA Open Model License',
    ja: 'コードは MIT、画像トークナイザーは NVIDIA Open Model License',
  },
  {
    en: 'Wallaroo: the prompt describes the picture, in English or Chinese.',
    zh: 'Wallaroo：用英语或中文提示词描述画面。',
    ja: 'Wallaroo：英語か中国語のプロンプトで画像を説明します。',
  },
  {
    en: 'Apache-2.0 (code)',
    zh: '代码采用 Apache-2.0 许可',
    ja: 'コードは Apache-2.0',
  },
  {
    en: 'Emu3.5: the prompt describes the picture.',
    zh: 'Emu3.5：用提示词描述画面。',
    ja: 'Emu3.5：プロンプトで画像を説明します。',
  },
]

const PATTERNS = TEXTS.map(({ en }) => {
  const escaped = en.replace(/[.*+?^$()|[\]\\]/g, '\\$&')
  return new RegExp(`^${escaped.replace(/\{\d\}/g, '(.+?)')}$`)
})

// As it is where there is no translation.
export function translated(text) {
  const which = PATTERNS.findIndex((pattern) => pattern.test(text))
  const found = text.match(PATTERNS[which])
  const translation = TEXTS[which]?.[language()]
  return translation?.replace(/\{(\d)\}/g, (_, number) => found[number]) ?? text
}
