#include "engine/kv_cache.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "engine/paged_cache.h"
#include "engine/ring_cache.h"
#include "kernels/check.h"

namespace longspan {
namespace {

absl::Status CheckSizes(const ModelSpec& spec, int page_tokens, int64_t bytes, int max_sequences,
                        int max_context) {
  const std::pair<const char*, int64_t> sizes[] = {{"page_tokens", page_tokens},
                                                   {"cache bytes", bytes},
                                                   {"max_sequences", max_sequences},
                                                   {"max_context", max_context}};
  for (const auto& [name, value] : sizes) {
    if (value < 1) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, ", the least is 1"));
    }
  }
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (const auto* recurrent = std::get_if<RecurrentSpec>(&spec.layers[i].mixer)) {
      return absl::UnimplementedError(
          absl::StrCat("layer ", i, ": no cache for a ", recurrent->kind, " state"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(Backend& backend, const ModelSpec& spec,
                                                         DType cache_dtype, int page_tokens,
                                                         int64_t bytes, int max_sequences,
                                                         int max_context) {
  const absl::Status sizes = CheckSizes(spec, page_tokens, bytes, max_sequences, max_context);
  if (!sizes.ok()) return sizes;
  const CacheNumbers numbers = NumbersOf(ShapeOf(spec, cache_dtype, page_tokens), bytes);
  const CacheDemand least = DemandOf(numbers.shape, 1);
  if (!numbers.Fits(least)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "a cache of ", bytes, " bytes does not hold one token: it needs ",
        numbers.SuperblocksFor(least), " superblocks of ", numbers.superblock_bytes, " bytes"));
  }
  const int64_t page = std::max(numbers.shape.paged_page_bytes, numbers.shape.ring_page_bytes);
  absl::StatusOr<Arena> arena = Arena::Create(backend, bytes, numbers.superblock_bytes, page);
  if (!arena.ok()) return arena.status();
  return std::unique_ptr<KvCache>(new KvCache(backend, *std::move(arena), numbers, spec,
                                              cache_dtype, max_sequences, max_context));
}

KvCache::KvCache(Backend& backend, Arena arena, const CacheNumbers& numbers, const ModelSpec& spec,
                 DType cache_dtype, int max_sequences, int max_context)
    : arena_(std::move(arena)),
      numbers_(numbers),
      max_context_(max_context),
      sequences_(max_sequences) {
  const CacheShape& shape = numbers_.shape;
  if (shape.paged_page_bytes > 0) {
    paged_ = std::make_unique<PagedCache>(backend, &arena_, shape.paged_page_bytes,
                                          shape.page_tokens, max_context, max_sequences);
    kinds_.push_back(paged_.get());
  }
  if (shape.ring_page_bytes > 0) {
    ring_ = std::make_unique<RingCache>(backend, &arena_, shape.ring_page_bytes, shape.page_tokens,
                                        shape.window, max_sequences);
    kinds_.push_back(ring_.get());
  }
  LayOut(spec, cache_dtype);
  for (SequenceId id = max_sequences - 1; id >= 0; --id) free_ids_.push_back(id);
  PublishUsage();
}

KvCache::~KvCache() = default;

void KvCache::LayOut(const ModelSpec& spec, DType cache_dtype) {
  int64_t paged_offset = 0, ring_offset = 0;
  for (const LayerSpec& layer : spec.layers) {
    if (layer.cache_of) {
      layer_views_.push_back(layer_views_[*layer.cache_of]);
      continue;
    }
    const auto& attention = std::get<AttentionSpec>(layer.mixer);
    const PageTable* table = attention.window ? ring_.get() : paged_.get();
    int64_t& offset = attention.window ? ring_offset : paged_offset;
    const int64_t bytes = BytesOf(
        cache_dtype, int64_t{attention.kv_heads} * numbers_.shape.page_tokens * attention.head_dim);
    KvView view;
    view.arena = arena_.data();
    view.key_offset = offset;
    view.value_offset = offset + bytes;
    view.dtype = cache_dtype;
    view.page_tokens = numbers_.shape.page_tokens;
    view.kv_heads = attention.kv_heads;
    view.head_dim = attention.head_dim;
    view.table = table->rows();
    view.table_stride = table->slots();
    view.slots = table->slots();
    layer_views_.push_back(view);
    offset += 2 * bytes;
  }
}

bool KvCache::CouldEverFit(int64_t tokens) const {
  return tokens <= max_context_ && numbers_.Fits(DemandOf(numbers_.shape, tokens));
}

SequenceId KvCache::Open() {
  if (free_ids_.empty()) return -1;
  const SequenceId id = free_ids_.back();
  free_ids_.pop_back();
  sequences_[id] = {.open = true, .committed = 0, .reserved = 0};
  PublishUsage();
  return id;
}

KvCache::PagesByKind KvCache::NewPages(SequenceId sequence, int64_t tokens) const {
  CHECK(sequences_[sequence].open);
  CHECK_LE(tokens, max_context_);
  PagesByKind pages = {};
  for (size_t k = 0; k < kinds_.size(); ++k) {
    pages[k] = kinds_[k]->NewPages(sequence, sequences_[sequence].committed, tokens);
  }
  return pages;
}

bool KvCache::Fits(const PagesByKind& new_pages) const {
  int64_t superblocks = 0;
  for (size_t k = 0; k < kinds_.size(); ++k) {
    const PagePool& pool = kinds_[k]->pool();
    const int64_t per_superblock = pool.pages_per_superblock();
    superblocks += (pool.used() + new_pages[k] + per_superblock - 1) / per_superblock;
  }
  return superblocks <= arena_.total();
}

bool KvCache::CanReserve(SequenceId sequence, int64_t tokens) const {
  return Fits(NewPages(sequence, tokens));
}

bool KvCache::Reserve(SequenceId sequence, int64_t tokens) {
  const PagesByKind new_pages = NewPages(sequence, tokens);
  if (!Fits(new_pages)) return false;
  MakeRoom(new_pages);
  Sequence& s = sequences_[sequence];
  for (PageTable* kind : kinds_) kind->Prepare(sequence, s.committed, tokens);
  s.reserved = std::max(s.reserved, tokens);
  PublishUsage();
  return true;
}

void KvCache::MakeRoom(const PagesByKind& new_pages) {
  for (;;) {
    int needed = 0;
    PageTable* sparse = nullptr;
    for (size_t k = 0; k < kinds_.size(); ++k) {
      const PagePool& pool = kinds_[k]->pool();
      needed += pool.SuperblocksFor(new_pages[k]);
      const int64_t room = int64_t{pool.leased()} * pool.pages_per_superblock() - pool.used();
      if (room - new_pages[k] >= pool.pages_per_superblock()) sparse = kinds_[k];
    }
    if (needed <= arena_.free()) return;
    // Fits() holds, so if every kind's pages filled their superblocks there would be enough.
    CHECK(sparse != nullptr);
    sparse->Compact();
  }
}

void KvCache::Commit(SequenceId sequence, int64_t tokens) {
  Sequence& s = sequences_[sequence];
  CHECK(s.open);
  CHECK_GE(tokens, s.committed);
  CHECK_LE(tokens, s.reserved);
  s.committed = tokens;
}

int64_t KvCache::committed(SequenceId sequence) const { return sequences_[sequence].committed; }

SequenceId KvCache::Fork(SequenceId parent) {
  CHECK(sequences_[parent].open);
  if (free_ids_.empty()) return -1;
  const int64_t tokens = sequences_[parent].committed;
  const SequenceId child = free_ids_.back();
  free_ids_.pop_back();
  sequences_[child] = {.open = true, .committed = tokens, .reserved = tokens};
  for (PageTable* kind : kinds_) kind->Share(parent, child, tokens);
  PublishUsage();
  return child;
}

void KvCache::Close(SequenceId sequence) {
  CHECK(sequences_[sequence].open);
  for (PageTable* kind : kinds_) kind->Clear(sequence);
  sequences_[sequence] = {};
  free_ids_.push_back(sequence);
  PublishUsage();
}

const KvView* KvCache::Views(const std::vector<SequenceId>& sequences) {
  for (PageTable* kind : kinds_) kind->Upload(sequences);
  return layer_views_.data();
}

CacheUsage KvCache::CountUsage() const {
  CacheUsage usage;
  usage.total_bytes = numbers_.bytes();
  usage.superblocks_total = arena_.total();
  usage.superblocks_free = arena_.free();
  usage.sequences = static_cast<int>(sequences_.size() - free_ids_.size());
  if (paged_ != nullptr) usage.paged_pages_used = paged_->pool().used();
  if (ring_ != nullptr) usage.ring_pages_used = ring_->pool().used();
  const CacheShape& shape = numbers_.shape;
  usage.used_bytes = usage.paged_pages_used * shape.paged_page_bytes +
                     usage.ring_pages_used * shape.ring_page_bytes;
  const auto free_pages = [&](const PageTable& kind, const CacheDemand& others) {
    const int64_t superblocks = arena_.total() - numbers_.SuperblocksFor(others);
    return superblocks * kind.pool().pages_per_superblock() - kind.pool().used();
  };
  if (paged_ != nullptr) {
    usage.paged_pages_free = free_pages(*paged_, {.ring_pages = usage.ring_pages_used});
    usage.paged_pages_total = int64_t{numbers_.superblocks} * paged_->pool().pages_per_superblock();
  }
  if (ring_ != nullptr) {
    usage.ring_pages_free = free_pages(*ring_, {.paged_pages = usage.paged_pages_used});
  }
  return usage;
}

void KvCache::PublishUsage() {
  const CacheUsage usage = CountUsage();
  absl::MutexLock lock(&mu_);
  usage_ = usage;
}

CacheUsage KvCache::Usage() const {
  absl::MutexLock lock(&mu_);
  return usage_;
}

absl::Status KvCache::CheckIntegrity() const {
  absl::Status status = arena_.CheckIntegrity();
  for (const PageTable* kind : kinds_) {
    status.Update(kind->pool().CheckIntegrity());
    status.Update(CheckReferences(*kind));
  }
  status.Update(CheckSequences());
  status.Update(CheckClosedForm());
  return status;
}

absl::Status KvCache::CheckReferences(const PageTable& table) const {
  absl::flat_hash_map<int32_t, int> references;
  for (size_t s = 0; s < sequences_.size(); ++s) {
    for (int32_t page : table.pages(static_cast<SequenceId>(s))) ++references[page];
  }
  for (const auto& [page, count] : references) {
    if (table.pool().References(page) != count) {
      return absl::InternalError(absl::StrCat("page ", page, " stands in ", count, " tables with ",
                                              table.pool().References(page), " references"));
    }
  }
  if (static_cast<int>(references.size()) != table.pool().used()) {
    return absl::InternalError(absl::StrCat(table.pool().used(), " pages have references, ",
                                            references.size(), " stand in tables"));
  }
  return absl::OkStatus();
}

absl::Status KvCache::CheckSequences() const {
  std::vector<bool> free(sequences_.size(), false);
  for (SequenceId id : free_ids_) {
    if (free[id] || sequences_[id].open) {
      return absl::InternalError(
          absl::StrCat("sequence ", id, " is free ", free[id] ? "twice" : "and open"));
    }
    free[id] = true;
  }
  for (size_t id = 0; id < sequences_.size(); ++id) {
    const Sequence& s = sequences_[id];
    if (!s.open && !free[id]) {
      return absl::InternalError(absl::StrCat("sequence ", id, " is lost"));
    }
    for (const PageTable* kind : kinds_) {
      const size_t pages = kind->pages(static_cast<SequenceId>(id)).size();
      if (s.committed > s.reserved || static_cast<int>(pages) != kind->PagesFor(s.reserved)) {
        return absl::InternalError(absl::StrCat("sequence ", id, " has ", s.committed,
                                                " tokens, room for ", s.reserved, " and ", pages,
                                                " pages instead of ", kind->PagesFor(s.reserved)));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status KvCache::CheckClosedForm() const {
  int leased = 0;
  for (int superblock = 0; superblock < arena_.total(); ++superblock) {
    int owners = 0;
    for (const PageTable* kind : kinds_) owners += kind->pool().Owns(superblock);
    if (owners != (arena_.leased(superblock) ? 1 : 0)) {
      return absl::InternalError(
          absl::StrCat("superblock ", superblock, " has ", owners, " owners"));
    }
    leased += owners;
  }
  CacheDemand demand;  // of all sequences, were nothing shared
  for (const Sequence& s : sequences_) demand += DemandOf(numbers_.shape, s.reserved);
  int64_t pages_in_tables = 0, used = 0;
  for (const PageTable* kind : kinds_) {
    for (size_t s = 0; s < sequences_.size(); ++s) {
      pages_in_tables += kind->pages(static_cast<SequenceId>(s)).size();
    }
    used += kind->pool().used();
  }
  const CacheUsage counted = CountUsage(), published = Usage();
  const bool shared = used < pages_in_tables;
  if (pages_in_tables != demand.paged_pages + demand.ring_pages ||
      (!shared && counted.used_bytes != demand.bytes) || counted.used_bytes > demand.bytes) {
    return absl::InternalError(
        absl::StrCat("the closed form is ", demand.bytes, " bytes, in use ", counted.used_bytes));
  }
  if (published.used_bytes != counted.used_bytes ||
      published.superblocks_free != arena_.total() - leased ||
      published.sequences != counted.sequences) {
    return absl::InternalError(absl::StrCat("the gauges say ", published.used_bytes,
                                            " bytes, in use ", counted.used_bytes));
  }
  return absl::OkStatus();
}

}  // namespace longspan
