package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

type topFlags struct {
	once     bool
	interval time.Duration
	sort     string
	count    int
}

func (a *app) topCommand() *cobra.Command {
	var t topFlags
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch models and their holders live",
		Long: `Top shows the models of the registry and refreshes them: size, how much of them is
in the memory of their holders (RESIDENT), the sum of the holders' shares of that
(PSS), holders, attaches per second, and age. It only reads.

Keys: k s r p h a g sort by key, size, resident, PSS, holders, attaches, age; q
quits. Looking into processes costs time: the interval grows so that top takes no
more than a twentieth of a processor, and a process is looked into again when its
address space or shared memory has grown or shrunk, and every twenty seconds.

Without a terminal it takes --once, which prints one table, or -o jsonl, which
prints one document per interval (or --count of them).`,
		Example: `  shmctl top
  shmctl top --once --sort pss
  shmctl top -o jsonl --interval 1s | jq '.models[] | {key, holders}'`,
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.top(cmd, t) },
	}
	f := cmd.Flags()
	f.BoolVar(&t.once, "once", false, "print once and end")
	f.DurationVar(&t.interval, "interval", 2*time.Second, "refresh after this `duration`")
	f.StringVar(&t.sort, "sort", "size", "sort by `column`: key, size, resident, pss, holders, attaches or age")
	f.IntVar(&t.count, "count", 0, "end after this `number` of documents (-o jsonl)")
	fromEnv(f, "interval", "sort")
	complete(cmd, "sort", topColumns...)
	return cmd
}

var topColumns = []string{"key", "size", "resident", "pss", "holders", "attaches", "age"}

type topModelJSON struct {
	Key               string     `json:"key"`
	State             string     `json:"state"`
	Generation        *uint64    `json:"generation"`
	Bytes             int64      `json:"bytes"`
	Pinned            bool       `json:"pinned"`
	Leased            bool       `json:"leased"`
	Holders           int        `json:"holders"` // visible ones
	ResidentBytes     int64      `json:"resident_bytes"`
	ProportionalBytes int64      `json:"proportional_bytes"`
	Attaches          uint64     `json:"attaches"`
	AttachesPerSecond *float64   `json:"attaches_per_second"` // null in the first document
	LoadedAt          *time.Time `json:"loaded_at"`
}

type topJSON struct {
	schema
	Dir           string         `json:"dir"`
	Time          *time.Time     `json:"time"`
	Models        []topModelJSON `json:"models"`
	Stats         *statsJSON     `json:"stats"` // null when there is no registry
	HiddenProcs   int            `json:"hidden_processes"`
	Outside       bool           `json:"outside_not_visible"` // a PID namespace of its own
	UnlinkedBytes int64          `json:"unlinked_bytes"`
}

// topSampler takes samples and remembers the last one for rates.
type topSampler struct {
	a    *app
	w    watcher
	last map[string]uint64
	at   time.Time
}

func (s *topSampler) sample() (doc topJSON, err error) {
	a := s.a
	now := a.now()
	doc = topJSON{schema: newSchema(), Dir: a.registryDir(), Time: utc(now), Models: []topModelJSON{}}
	var all registry.Overview
	var rep registry.HolderReport
	err = s.w.look(func(w *registry.Watch) (err error) {
		all, rep, err = w.OverviewAndHolders()
		return err
	})
	if errors.Is(err, registry.ErrNoRegistry) {
		return doc, nil
	}
	if err != nil {
		return doc, err
	}
	es, stats := all.Entries, all.Stats
	st := toStatsJSON(stats)
	doc.Stats, doc.HiddenProcs, doc.UnlinkedBytes, doc.Outside = &st, rep.Hidden, rep.Unlinked, rep.Outside
	type held struct {
		n        int
		res, pss int64
	}
	by := map[string]*held{}
	for _, h := range rep.Holders {
		if by[h.Key] == nil {
			by[h.Key] = &held{}
		}
		if h.Via != "unlinked" { // who is listed for the lease too, if there is one
			by[h.Key].n++
		}
		by[h.Key].res += h.Resident
		by[h.Key].pss += h.Proportional
	}
	attaches := map[string]uint64{}
	for _, e := range es {
		attaches[e.Key] = e.Attaches
		m := topModelJSON{
			Key: e.Key, State: e.State, Generation: orNull(e.Generation), Bytes: e.Bytes, Pinned: e.Pinned,
			Leased: e.Leased, Attaches: e.Attaches,
		}
		if h := by[e.Key]; h != nil {
			m.Holders, m.ResidentBytes, m.ProportionalBytes = h.n, h.res, h.pss
		}
		if e.Info != nil {
			m.LoadedAt = utc(e.Info.LoadedAt)
		}
		if d := now.Sub(s.at).Seconds(); s.last != nil && d > 0 {
			// A model that was removed and loaded again counts from 0 again.
			rate := float64(e.Attaches-min(s.last[e.Key], e.Attaches)) / d
			m.AttachesPerSecond = &rate
		}
		doc.Models = append(doc.Models, m)
	}
	s.last, s.at = attaches, now
	return doc, nil
}

func sortTop(ms []topModelJSON, column string) {
	slices.SortStableFunc(ms, func(x, y topModelJSON) int {
		var c int
		switch column {
		case "size":
			c = cmp.Compare(y.Bytes, x.Bytes)
		case "resident":
			c = cmp.Compare(y.ResidentBytes, x.ResidentBytes)
		case "pss":
			c = cmp.Compare(y.ProportionalBytes, x.ProportionalBytes)
		case "holders":
			c = cmp.Compare(y.Holders, x.Holders)
		case "attaches":
			if x.AttachesPerSecond != nil && y.AttachesPerSecond != nil {
				c = cmp.Compare(*y.AttachesPerSecond, *x.AttachesPerSecond)
			}
			c = cmp.Or(c, cmp.Compare(y.Attaches, x.Attaches))
		case "age":
			if x.LoadedAt != nil && y.LoadedAt != nil {
				c = x.LoadedAt.Compare(*y.LoadedAt)
			}
		}
		return cmp.Or(c, strings.Compare(x.Key, y.Key))
	})
}

func (a *app) top(cmd *cobra.Command, t topFlags) error {
	if !slices.Contains(topColumns, t.sort) {
		return usagef("", "--sort %q: want %s", t.sort, strings.Join(topColumns, ", "))
	}
	if t.interval <= 0 {
		return usagef("", "--interval %v: it must be more than 0", t.interval)
	}
	if t.count < 0 {
		return usagef("", "--count %d is negative", t.count)
	}
	s := &topSampler{a: a, w: watcher{a: a}}
	defer s.w.close()
	switch {
	case a.output == formatJSONL && !t.once:
		return a.topStream(cmd, t, s)
	case t.once || a.json() || a.output == formatName:
		doc, err := s.sample()
		if err != nil {
			return err
		}
		sortTop(doc.Models, t.sort)
		return a.writeTop(doc)
	}
	out, ok := a.stdout.(*os.File)
	if !ok || !isTerminal(a.stdout) || !isTerminal(a.stdin) || a.getenv("TERM") == "dumb" || a.getenv("TERM") == "" {
		return usagef("--once prints one table, -o jsonl one document per interval", "top needs a terminal")
	}
	ctx, stop := a.context(cmd)
	defer stop()
	env := a.env
	if !a.coloured(true) {
		env = setenv(env, "NO_COLOR", "1")
	}
	m := &topModel{a: a, s: s, t: t}
	_, err := tea.NewProgram(m, tea.WithContext(ctx), tea.WithInput(a.stdin), tea.WithOutput(out),
		tea.WithEnvironment(env), tea.WithoutSignalHandler()).Run()
	switch {
	case m.err != nil:
		return m.err
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return err
}

func (a *app) topStream(cmd *cobra.Command, t topFlags, s *topSampler) error {
	ctx, stop := a.context(cmd)
	defer stop()
	for n := 1; ; n++ {
		begun := processorTime()
		doc, err := s.sample()
		if err != nil {
			return err
		}
		sortTop(doc.Models, t.sort)
		if err := a.writeJSON(doc); err != nil {
			return err
		}
		if n == t.count {
			return nil
		}
		timer := time.NewTimer(pace(t.interval, processorTime()-begun))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

// pace keeps top from using more than a twentieth of a processor; cost is the
// processor time of a refresh, whoever else keeps the processors busy.
func pace(interval, cost time.Duration) time.Duration { return max(interval, 20*cost) - cost }

var topHeader = []string{"KEY", "STATE", "GEN", "SIZE", "RESIDENT", "PSS", "HOLDERS", "ATTACH/S", "PIN", "AGE"}

func (a *app) topRow(m topModelJSON) []string {
	gen, rate, age := "-", "-", "-"
	if m.Generation != nil {
		gen = strconv.FormatUint(*m.Generation, 10)
	}
	if m.AttachesPerSecond != nil {
		rate = strconv.FormatFloat(*m.AttachesPerSecond, 'f', 1, 64)
	}
	if m.LoadedAt != nil {
		age = a.age(*m.LoadedAt)
	}
	return []string{
		m.Key, m.State, gen, a.size(m.Bytes), a.size(m.ResidentBytes), a.size(m.ProportionalBytes),
		strconv.Itoa(m.Holders), rate, yesNo(m.Pinned), age,
	}
}

func (a *app) writeTop(doc topJSON) error {
	switch {
	case a.json():
		return a.writeJSON(doc)
	case a.output == formatName:
		for _, m := range doc.Models {
			if err := a.writeLines(m.Key); err != nil {
				return err
			}
		}
		return nil
	}
	if doc.Stats == nil {
		a.noteNoRegistry()
	}
	var rows [][]string
	for _, m := range doc.Models {
		rows = append(rows, a.topRow(m))
	}
	if err := a.writeTable(topHeader, rows); err != nil {
		return err
	}
	return a.writeLines("", visible(a.topSummary(doc)))
}

func (a *app) topSummary(doc topJSON) string {
	if doc.Stats == nil {
		return "no registry at " + doc.Dir
	}
	st := doc.Stats
	s := fmt.Sprintf("%s, %s used of a budget of %s, %s free", plural(st.Models, "model"), a.size(st.UsedBytes), a.size(st.BudgetBytes), a.size(st.FreeBytes))
	if st.Superseded > 0 {
		s += fmt.Sprintf(", %s in %s", a.size(st.SupersededBytes), plural(st.Superseded, "replaced generation"))
	}
	if doc.UnlinkedBytes > 0 {
		s += fmt.Sprintf(", %s mapped without a name", a.size(doc.UnlinkedBytes))
	}
	if doc.HiddenProcs > 0 {
		s += ", " + processes(doc.HiddenProcs) + " not visible"
	}
	if doc.Outside {
		s += ", nobody outside this PID namespace visible"
	}
	return s
}

// topModel is the live view.
type topModel struct {
	a             *app
	s             *topSampler
	t             topFlags
	doc           topJSON
	cost          time.Duration
	width, height int
	err           error
}

type topSample struct {
	doc  topJSON
	err  error
	cost time.Duration
}

type (
	topTick  struct{}
	topWatch struct{}
)

func (m *topModel) Init() tea.Cmd { return tea.Batch(m.refresh, watchTerminal()) }

// watchTerminal asks to look whether the terminal is still there.
func watchTerminal() tea.Cmd {
	return tea.Tick(time.Second, func(time.Time) tea.Msg { return topWatch{} })
}

func (m *topModel) refresh() tea.Msg {
	begun := processorTime()
	doc, err := m.s.sample()
	return topSample{doc, err, processorTime() - begun}
}

func (m *topModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case topSample:
		if msg.err != nil {
			m.err = msg.err
		}
		if m.err != nil { // of this sample, or of the terminal a moment ago
			return m, tea.Quit
		}
		m.doc = msg.doc
		sortTop(m.doc.Models, m.t.sort)
		return m, tea.Tick(pace(m.t.interval, msg.cost), func(time.Time) tea.Msg { return topTick{} })
	case topTick:
		return m, m.refresh
	case topWatch:
		// A terminal that was closed is none any more. The signal that says so
		// may be ignored, as nohup does.
		if !isTerminal(m.a.stdout) {
			m.err = errors.New("the terminal is gone")
			return m, tea.Quit
		}
		return m, watchTerminal()
	case tea.KeyPressMsg:
		switch k := msg.String(); k {
		case "q", "esc", "ctrl+c":
			return m, tea.Quit
		default:
			column := map[string]string{"k": "key", "s": "size", "r": "resident", "p": "pss", "h": "holders", "a": "attaches", "g": "age"}[k]
			if column != "" {
				m.t.sort = column
				sortTop(m.doc.Models, column)
			}
		}
	}
	return m, nil
}

func (m *topModel) View() tea.View {
	a := m.a
	rows := [][]string{topHeader}
	for _, e := range m.doc.Models {
		row := a.topRow(e)
		row[0] = visible(row[0])
		rows = append(rows, row)
	}
	widths := make([]int, len(topHeader))
	for _, row := range rows {
		for i, c := range row {
			widths[i] = max(widths[i], len([]rune(c)))
		}
	}
	summary := "" // until there is something to say
	if m.doc.Time != nil {
		summary = visible(a.topSummary(m.doc))
	}
	lines := []string{summary, "sorted by " + m.t.sort + "; k s r p h a g sort, q quits", ""}
	for n, row := range rows {
		var b strings.Builder
		for i, c := range row {
			fmt.Fprintf(&b, "%-*s   ", widths[i], c)
		}
		line := clipRunes(strings.TrimRight(b.String(), " "), m.width)
		if n == 0 && a.coloured(true) {
			line = "\x1b[1m" + line + "\x1b[0m"
		}
		lines = append(lines, line)
	}
	if m.height > 0 && len(lines) > m.height {
		hidden := len(lines) - m.height + 1
		lines = append(lines[:m.height-1], fmt.Sprintf("and %d more", hidden))
	}
	v := tea.NewView(strings.Join(lines, "\n"))
	v.AltScreen = true
	return v
}

func clipRunes(s string, n int) string {
	if r := []rune(s); n > 0 && len(r) > n {
		return string(r[:n])
	}
	return s
}
